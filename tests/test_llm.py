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
from torch import nn
from transformers import AutoTokenizer

from ipt2v.config import DecoupleConfig
from ipt2v.models.llm import load_generator, seeded_sampling
from ipt2v.records import Answer, item_seed

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
    return texts(load_generator(folder, settings(**changes), base_seed=base_seed, device=CPU)(messages))


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in answers]


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
        assert texts(generate(order)) == [alone[message] for message in order]
    assert texts(generate([MESSAGES[0]] * 3)) == [alone[MESSAGES[0]]] * 3


def test_another_process_gives_the_same_answers(qwen: Path, alone: dict[str, str]) -> None:
    code = (
        "import json, sys, torch; from pathlib import Path; from ipt2v.config import DecoupleConfig;"
        "from ipt2v.models.llm import load_generator; folder, settings, messages = map(json.loads, sys.argv[1:]);"
        "generate = load_generator(Path(folder), DecoupleConfig(**settings), base_seed=7, device=torch.device('cpu'));"
        "print(json.dumps([one.text for one in generate(messages)]))"
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
        assert texts(generate(MESSAGES[:2])) == [alone[message] for message in MESSAGES[:2]]
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


def test_an_answer_that_was_cut_off_is_known_from_one_that_ended(qwen: Path) -> None:
    for max_new_tokens in (3, 400):
        generate = load_generator(qwen, settings(max_new_tokens=max_new_tokens), base_seed=7, device=CPU)
        (short,) = generate(MESSAGES[:1])
        assert short.finished == (max_new_tokens == 400)
