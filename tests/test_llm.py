"""An answer of the LLM depends on its message, the seed and the settings alone, and is made a clean prompt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from ipt2v.config import DecoupleConfig
from ipt2v.models.llm import Decoupled, clean, load_decoupler, load_generator, seeded_sampling
from ipt2v.prompts import fill, read_template
from ipt2v.records import item_seed

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
MESSAGES = ("a woman walks", "two boys in the park, at night", "色调艳丽", "the dog", "he drives a car", "she sings", "rain")


def settings(**changes: Any) -> DecoupleConfig:
    defaults = {"dtype": "float32", "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 12}
    templates = {"spatial_template": "Show: {prompt}", "temporal_template": "{subject} moves: {prompt}"}
    return DecoupleConfig(**(defaults | templates | changes))


@pytest.fixture(scope="module")
def qwen(toy_weights: Path) -> Path:
    return toy_weights / "Qwen3-8B"


def answers(folder: Path, messages: Sequence[str], *, base_seed: int = 7, **changes: Any) -> list[str]:
    return load_generator(folder, settings(**changes), base_seed=base_seed, device=CPU)(messages)


@pytest.fixture(scope="module")
def alone(qwen: Path) -> dict[str, str]:
    """Message -> its answer from a model that was asked nothing else."""
    return {message: answers(qwen, [message])[0] for message in MESSAGES}


@pytest.fixture
def asked(qwen: Path) -> Iterator[list[str]]:
    """The texts that any causal language model reads from now on, as it reads them, one for each row."""
    tokenizer, texts = AutoTokenizer.from_pretrained(qwen), []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if (
            isinstance(module, nn.Embedding) and args[0].shape[1] > 1
        ):  # after the message follow the answer's tokens, one by one
            texts.extend(text.removeprefix("<|endoftext|>") for text in tokenizer.batch_decode(args[0]))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    yield texts
    hook.remove()


# ---- sampling

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
NUM_SEEDS = 20_000
SEEDS = [item_seed(2025, str(number), "decouple") for number in range(NUM_SEEDS)]


def expected_probabilities(temperature: float, top_p: float) -> torch.Tensor:
    """softmax(logits / T) of the fewest most likely tokens that reach top_p. LOGITS are in falling order."""
    probabilities = torch.softmax(LOGITS.double() / temperature, 0)
    kept = probabilities.cumsum(0) - probabilities < top_p
    return probabilities * kept / (probabilities * kept).sum()


def choices(temperature: float, top_p: float, *, num_steps: int = 1) -> list[torch.Tensor]:
    """The greedy choice of each seed, for each of the steps."""
    processors = seeded_sampling(temperature, top_p, SEEDS)
    token_ids = torch.zeros(NUM_SEEDS, 1, dtype=torch.long)
    return [processors(token_ids, LOGITS.repeat(NUM_SEEDS, 1)).argmax(-1) for _ in range(num_steps)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.9), (2.0, 0.6), (0.1, 0.9), (1.0, 0.01)])
def test_the_greedy_choice_is_distributed_as_the_softmax_at_temperature_and_top_p(temperature: float, top_p: float) -> None:
    counts = torch.bincount(choices(temperature, top_p)[0], minlength=6).double()
    expected = expected_probabilities(temperature, top_p)
    total_variation = (counts / NUM_SEEDS - expected).abs().sum().item() / 2
    assert total_variation < 0.015, (counts, expected)  # 6 standard deviations of 20 000 draws from 6 tokens are less
    assert (counts[expected == 0] == 0).all()


def test_each_token_of_an_answer_is_drawn_anew() -> None:
    first, second = choices(1.0, 1.0, num_steps=2)
    pairs = torch.bincount(6 * first + second, minlength=36).double() / NUM_SEEDS
    probabilities = expected_probabilities(1.0, 1.0)
    assert (pairs - torch.outer(probabilities, probabilities).flatten()).abs().sum().item() / 2 < 0.03


def test_a_row_is_drawn_from_its_own_seed_whatever_is_beside_it() -> None:
    def scores(seeds: list[int], step: int) -> torch.Tensor:
        processors = seeded_sampling(0.7, 0.95, seeds)
        token_ids, logits = torch.zeros(len(seeds), 1, dtype=torch.long), torch.linspace(0, 3, 1000).repeat(len(seeds), 1)
        return [processors(token_ids, logits) for _ in range(step)][-1]

    for step in (1, 2, 3):
        together = scores([5, 6, 7], step)
        assert torch.equal(together[1], scores([6], step)[0])
        assert torch.equal(together[2], scores([7, 5], step)[0])
        assert not torch.equal(together[0], together[1])


def test_temperature_0_is_greedy_for_every_seed(qwen: Path) -> None:
    assert len(seeded_sampling(0, 0.9, [1, 2])) == 0
    greedy = answers(qwen, MESSAGES, temperature=0.0)
    assert answers(qwen, MESSAGES, temperature=0.0, base_seed=8) == greedy
    assert answers(qwen, MESSAGES, temperature=1e-4) == greedy


# ---- answers


def test_an_answer_does_not_depend_on_what_is_asked_before_it(qwen: Path, alone: dict[str, str]) -> None:
    generate = load_generator(qwen, settings(), base_seed=7, device=CPU)
    for order in (MESSAGES, MESSAGES[::-1], MESSAGES[2:5]):
        assert generate(order) == [alone[message] for message in order]
    assert generate([MESSAGES[0]] * 3) == [alone[MESSAGES[0]]] * 3


def test_another_process_gives_the_same_answers(qwen: Path, alone: dict[str, str]) -> None:
    code = (
        "import json, sys, torch; from pathlib import Path; from ipt2v.config import DecoupleConfig;"
        "from ipt2v.models.llm import load_generator; folder, settings, messages = map(json.loads, sys.argv[1:]);"
        "generate = load_generator(Path(folder), DecoupleConfig(**settings), base_seed=7, device=torch.device('cpu'));"
        "print(json.dumps(generate(messages)))"
    )
    arguments = [json.dumps(value) for value in (str(qwen), settings().model_dump(), MESSAGES[::-1])]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [alone[message] for message in MESSAGES[::-1]]


def test_answers_to_different_messages_and_seeds_differ(qwen: Path, alone: dict[str, str]) -> None:
    assert len(set(alone.values())) == len(MESSAGES)
    other_seed = answers(qwen, MESSAGES, base_seed=8)
    assert all(new != alone[message] for new, message in zip(other_seed, MESSAGES, strict=True))


def test_the_global_random_state_neither_matters_nor_moves(qwen: Path, alone: dict[str, str]) -> None:
    generate = load_generator(qwen, settings(), base_seed=7, device=CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        assert generate(MESSAGES[:2]) == [alone[message] for message in MESSAGES[:2]]
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batches_answer_every_message_in_its_place(qwen: Path, alone: dict[str, str], batch_size: int) -> None:
    assert answers(qwen, MESSAGES, batch_size=batch_size) == list(alone.values())
    assert answers(qwen, [], batch_size=batch_size) == []


def test_an_answer_has_at_most_as_many_tokens_as_the_settings_say(qwen: Path) -> None:
    lengths = [len(answer.split()) for answer in answers(qwen, MESSAGES, max_new_tokens=5)]  # a word is a token to the toy
    assert max(lengths) == 5


def test_a_message_is_asked_as_the_user_with_thinking_off(qwen: Path, asked: list[str]) -> None:
    answers(qwen, ["a woman walks"])
    end = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert asked == [f"<|im_start|>user\na woman walks{end}"]


@pytest.mark.parametrize(
    "checkpoint_settings",
    [
        {"do_sample": True, "temperature": 9.0, "top_k": 1, "top_p": 0.01},
        {"repetition_penalty": 30.0},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "min_new_tokens": 11, "max_length": 3, "max_new_tokens": 2},
        {"num_beams": 3, "do_sample": False},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_checkpoints_own_generation_settings_have_no_say(
    qwen: Path, tmp_path: Path, temperature: float, checkpoint_settings: dict[str, Any]
) -> None:
    folder = shutil.copytree(qwen, tmp_path / "qwen")
    path = folder / "generation_config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name.endswith("_id")}
    path.write_text(json.dumps(kept | checkpoint_settings))

    found = answers(folder, MESSAGES, temperature=temperature, max_new_tokens=30)

    assert found == answers(qwen, MESSAGES, temperature=temperature, max_new_tokens=30)


# ---- decouple


def test_each_pair_gets_its_two_prompts_from_the_two_templates(qwen: Path) -> None:
    decouple = load_decoupler(qwen, settings(), base_seed=7, device=CPU)
    pairs = [("a woman walks", "A woman"), ("a dog", "A person")]
    spatial = answers(qwen, ["Show: a woman walks", "Show: a dog"])
    temporal = answers(qwen, ["A woman moves: a woman walks", "A person moves: a dog"])
    assert decouple(pairs) == [Decoupled(spatial=spatial[i].strip(), temporal=temporal[i].strip()) for i in range(2)]


def test_equal_pairs_are_asked_once_and_get_equal_answers(qwen: Path, asked: list[str]) -> None:
    decouple = load_decoupler(qwen, settings(), base_seed=7, device=CPU)
    one, other = ("a woman walks", "A person"), ("a woman walks", "A woman")

    first, second, third, fourth = decouple([one, other, one, one])

    assert first == third == fourth
    assert second.temporal != first.temporal
    assert len(asked) == 4  # two templates for each of two pairs


def test_braces_in_a_prompt_are_asked_as_they_are(qwen: Path, asked: list[str]) -> None:
    prompt = "a {subject} in {0} with {prompt}, {{"
    load_decoupler(qwen, settings(), base_seed=7, device=CPU)([(prompt, "A man")])
    assert [text.split("<|im_end|>")[0].removeprefix("<|im_start|>user\n") for text in asked] == [
        f"Show: {prompt}",
        f"A man moves: {prompt}",
    ]


@pytest.fixture
def silent_qwen(qwen: Path, tmp_path: Path) -> Path:
    """A checkpoint that ends its turn at once."""
    folder = shutil.copytree(qwen, tmp_path / "silent")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][json.loads((folder / "config.json").read_text())["eos_token_id"], 0] = 1000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_empty_answer_falls_back_to_the_prompt(silent_qwen: Path) -> None:
    assert answers(silent_qwen, MESSAGES[:1]) == [""]
    decoupled = load_decoupler(silent_qwen, settings(), base_seed=7, device=CPU)([("a woman  walks", "A woman")])
    assert decoupled == [Decoupled(spatial="a woman  walks", temporal="a woman  walks")]


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ("a woman walks", "a woman walks"),
        ("  a woman\n\nwalks\t slowly \n", "a woman walks slowly"),
        ("<think>\n\n</think>\n\na woman", "a woman"),
        ("<think>first, the\nperson</think>a woman", "a woman"),
        ("<think>one</think>a <think>two</think>woman", "a woman"),
        ("<think>one<think>two</think>three</think>a woman", "a woman"),
        ("so I say</think> a woman", "a woman"),
        ("one</think>two</think>a woman", "a woman"),
        ("<think>only thoughts</think>", ""),
        ("<think>never ends, never answers", ""),
        ("</think>", ""),
        (" \n ", ""),
        ("", ""),
        ("色调\n艳丽, 1 < 2 > 0", "色调 艳丽, 1 < 2 > 0"),
    ],
)
def test_a_clean_answer_has_no_thoughts_and_one_line(answer: str, cleaned: str) -> None:
    assert clean(answer) == cleaned


# ---- templates


@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_a_packaged_template_is_read_by_name_and_its_text_stands_for_itself(name: str) -> None:
    text = read_template(name)
    assert "{prompt}" in text and text == text.strip()
    assert read_template(text) == text


def test_the_templates_say_what_the_two_prompts_are() -> None:
    assert "{subject}" in read_template("temporal")
    assert "close-up" in read_template("spatial")


def test_a_template_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "my template.txt"
    path.write_text("\n色 {prompt}!\n", encoding="utf-8")
    assert read_template(str(path)) == "色 {prompt}!"


@pytest.mark.parametrize("name", ["spatail", "/no/such/file.txt", "", ".", "write it well, please " * 20])
def test_a_template_that_is_not_there_is_answered_with_those_that_are(name: str) -> None:
    with pytest.raises(ValueError, match="no such file; give a path to a text file, or a packaged one: spatial, temporal"):
        read_template(name)


def test_a_template_without_a_place_for_the_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("describe {promt}")
    with pytest.raises(ValueError, match=r"t\.txt: no \{prompt\} in it; mark the place"):
        read_template(str(path))


def test_nothing_inside_a_prompt_is_filled_in() -> None:
    prompt = "{subject} {0} {prompt} {{}} %s \\1"
    assert fill("{subject}: {prompt} / {prompt}", prompt, "A man") == f"A man: {prompt} / {prompt}"
