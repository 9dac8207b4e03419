"""What to make, from YAML: RunConfig holds everything that may change a pixel, and nothing that may not.

Strict: an unknown key is an error that names the nearest known one. Knows no paths of weights or runs, no scheduler.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
Metric = Literal[
    # the paper's six, but for Arc-Sim as VBench computes them; after Arc-Sim and DD what they are made of
    "arc_sim",
    "face_rate",
    "oc",
    "aq",
    "iq",
    "ms",
    "dd",
    "motion_pixels",
    # the challenge's four; face_distance is what it calls FID
    "face_arc",
    "face_cur",
    "face_distance",
    "clip_score",
    # ours
    "first_frame_arc_sim",
    "drift",
    "motion_amplitude",
]


OffloadingT = TypeVar("OffloadingT", "DecoupleConfig", "TextEncoderConfig", "VideoConfig")


class Settings(BaseModel):
    """One block of a settings file: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TestsetConfig(Settings):
    """Where the (photo, prompt) pairs are; their content, not their place, is in the run's digest."""

    path: str
    format: str = "auto"
    identities: int | None = Field(None, ge=1)  # so many people only, spread evenly over the test set's list


def _only_zero3_offloads(settings: OffloadingT) -> OffloadingT:
    """`settings`, unchanged; a validator that several blocks share."""
    if settings.cpu_offload and settings.weights_sharding != "zero3":
        raise ValueError(
            f"found cpu_offload with weights_sharding {settings.weights_sharding!r}, expected 'zero3', which alone can; "
            "set weights_sharding to zero3, or cpu_offload to false"
        )
    return settings


class DecoupleConfig(Settings):
    """The LLM that splits a prompt into a spatial and a temporal one."""

    model: str = "Qwen3-8B"
    dtype: Dtype = "bfloat16"
    temperature: float = Field(0.1, ge=0)  # 0 is greedy
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(1000, ge=1)
    batch_size: int = Field(1, ge=1)  # above 1 an answer may depend, in its last bits, on its batch-mates' lengths
    # a name in ipt2v/prompts, a path to a text file with {prompt}, or the text itself; frozen as text
    spatial_template: str = "spatial"
    temporal_template: str = "temporal"
    prompts: Literal["refined", "raw"] = "refined"  # what animates: the polisher's answer, or the test set's prompt as it is
    spatial_source: Literal["raw", "polished"] = "raw"  # what the parser reads: the paper says raw, its released code polished
    # Memory, not pixels: whether several ranks cut its matrices into slices, or gather them whole, one layer at a time
    weights_sharding: Literal["tensor", "zero3"] = "tensor"
    cpu_offload: bool = False  # zero3's share in the host's memory, on a GPU only while it is needed; on one rank, too

    _offload = model_validator(mode="after")(_only_zero3_offloads)


class FacesConfig(Settings):
    """The face models that tell who is in the photo."""

    model: str = "antelopev2"  # a folder of insightface's ONNX files


class CutoutConfig(Settings):
    """HRNet, which cuts the person out of the reference photo, on white."""

    enabled: bool = True  # False: the photo as it is
    model: str = "HRNetV2-W48"
    file: str = Field("hrnet_lip_5583_torch04.pth", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    align_corners: bool = False  # as the checkpoint was trained: LIP's without, many of the OCR branch with
    input_size: int = Field(473, ge=32)  # the photo is squashed to this square: 473 for LIP, about 512 for others
    feather_pixels: float = Field(0.0, ge=0)  # standard deviation of the Gaussian that blurs the mask
    largest_component: bool = False  # True: who stands apart is dropped


class HyperLoRAConfig(Settings):
    """HyperLoRA, which turns the reference's face into a LoRA of the painter; values of the paper's released code."""

    enabled: bool = True  # False: painted from the prompt alone
    model: str = "HyperLoRA"
    variant: Literal["fidelity", "edit"] = "fidelity"
    weight: float = Field(0.85, ge=0)
    remove_background: bool = True  # CLIP sees the face alone, without hair and background
    trigger_words: str = "fcsks fxhks fhyks, "  # what it was trained with; in front of every spatial prompt


class PictureSize(Settings):
    """Width and height in pixels of what a diffusion model makes."""

    width: int = Field(832, ge=16)
    height: int = Field(480, ge=16)

    @field_validator("width", "height")
    @classmethod
    def _multiple_of_16(cls, pixels: int) -> int:
        # 16 = VAE factor 8 x patch 2 (diffusers' WanVACEPipeline.check_inputs)
        if pixels % 16:
            below = pixels // 16 * 16
            raise ValueError(f"{pixels} is not a multiple of 16; nearest are {below} and {below + 16}")
        return pixels


class FaceDetailerConfig(Settings):
    """How each face of a first frame is redrawn; words and values of the node as the paper's released code sets it."""

    enabled: bool = True
    guide_size: int = Field(1024, ge=16)  # the box's shorter side is enlarged to this many pixels ...
    max_size: int = Field(1024, ge=16)  # ... unless the crop's longer side would be larger than this
    steps: int = Field(10, ge=1)
    denoise: float = Field(0.5, gt=0, le=1)  # part of the noise levels that is gone through
    cfg: float = Field(5.0, ge=1)
    feather: int = Field(5, ge=0)  # pixels
    dilation: int = Field(10, ge=0)  # side in pixels of the square that the mask is dilated with
    crop_factor: float = Field(2.0, ge=1)  # the crop's sides are the box's times this
    drop_size: int = Field(10, ge=0)  # a box with a side of no more pixels is left alone
    threshold: float = Field(0.5, ge=0, le=1)  # least score of a face; the analysis of faces finds none below 0.5


class FirstFrameConfig(PictureSize):
    """SDXL, as it paints the first frame."""

    model: str = "RealVisXL_V4.0"
    dtype: Dtype = "float16"
    num_inference_steps: int = Field(20, ge=1)
    guidance_scale: float = Field(5.0, ge=1)
    negative_prompt: str = ""
    max_attempts: int = Field(3, ge=1)  # paintings of an item; the one most like the reference is kept
    enough_similarity: float = Field(0.5, ge=-1, le=1)  # no further attempt above this ArcFace cosine
    face_detailer: FaceDetailerConfig = FaceDetailerConfig()


class SpeedConfig(Settings):
    """How the video transformer computes. What may change rounding is off until you have measured it."""

    keep_text: bool = True  # what follows from the text alone is computed once a video; equal bit for bit; idle when compiled
    fuse_qkv: bool = False  # one product for query, key and value of a self-attention; needs whole weights
    compile: Literal["off", "default", "max-autotune-no-cudagraphs"] = "off"  # torch.compile, block by block
    best_attention: bool = False  # pins the best of torch's attention kernels here, and names it in the log


class StepCacheConfig(Settings):
    """Steps that are not computed in full; this changes the video, so it is off."""

    threshold: float = Field(0.0, ge=0)  # relative change of the first blocks' output below which the rest is skipped; 0: never
    num_first_blocks: int = Field(8, ge=1)  # that always run
    warmup_steps: int = Field(8, ge=1)  # computed in full at the start
    max_skips: int = Field(3, ge=0)  # in a row


class TextEncoderConfig(Settings):
    """Where UMT5's weights are, which embeds the texts in video.dtype; memory, not pixels."""

    weights_sharding: Literal["none", "zero3"] = "none"  # zero3: shared by the ranks, gathered one layer at a time
    cpu_offload: bool = False  # zero3's share in the host's memory, on a GPU only while it is needed; on one rank, too

    _offload = model_validator(mode="after")(_only_zero3_offloads)


class VideoConfig(PictureSize):
    """VACE, as it animates the first frame, and the MP4 that is delivered."""

    model: str = "Wan2.1-VACE-14B-diffusers"
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    # what VACE starts from: array 1's painting, the cut-out photo (the paper's baseline, reference-to-video), or both
    condition: Literal["first_frame", "reference", "both"] = "first_frame"
    scheduler: Literal["unipc", "dpm++"] = "unipc"
    num_frames: int = Field(81, ge=5)
    fps: int = Field(16, ge=1)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(5.0, ge=1)
    flow_shift: float = Field(3.0, gt=0)
    conditioning_scale: float = Field(1.0, ge=0)
    negative_prompt: str = ""
    max_text_tokens: int = Field(512, ge=1)  # diffusers' WanVACEPipeline: max_sequence_length=512
    crf: Annotated[int, Field(ge=0, le=51)] = 18
    save_every_steps: int = Field(10, ge=0)  # so many a killed video repeats at most; 0: it starts again. No pixels
    speed: SpeedConfig = SpeedConfig()
    step_cache: StepCacheConfig = StepCacheConfig()
    # Memory, not pixels: whether each rank holds the whole transformer, or the ranks of a video share it. Idle on one rank.
    weights_sharding: Literal["none", "fsdp2", "zero3"] = "none"
    cpu_offload: bool = False  # zero3's share in the host's memory, on a GPU only while it is needed

    _offload = model_validator(mode="after")(_only_zero3_offloads)

    @field_validator("num_frames")
    @classmethod
    def _four_n_plus_one(cls, num_frames: int) -> int:
        if num_frames % 4 != 1:  # the Wan VAE keeps frame 0 and folds each further 4 (vae_stride[0] = 4, Wan2.1 wan_t2v_14B.py)
            below = (num_frames - 1) // 4 * 4 + 1
            raise ValueError(f"{num_frames} is not 4n+1; nearest are {below} and {below + 4}")
        return num_frames


class RehearsalConfig(Settings):
    """Everything but the models: placeholder pictures, to prove the rest of a run before GPUs are paid for."""

    enabled: bool = False
    seconds: float = Field(0.0, ge=0)  # that a video pretends to take
    spread: float = Field(1.0, ge=1)  # up to so many times as long, depending on its key


class ScoreModelsConfig(Settings):
    """Folders of weights that scores need; only those of the metrics that are asked for have to be there."""

    faces: str = "buffalo_l"  # what the challenge scores with; antelopev2, which paints, would flatter itself
    curricular: str = "CurricularFace"
    inception: str = "Inception-v3"
    viclip: str = "ViCLIP"
    clip_l: str = "CLIP-ViT-L-14"
    clip_b: str = "CLIP-ViT-B-32"
    aesthetic: str = "LAION-aesthetic"
    musiq: str = "MUSIQ-SPAQ"
    amt: str = "AMT-S"
    raft: str = "RAFT-things"


class AcceptConfig(Settings):
    """When a video is good enough. `submit --rejected` makes others again, with another seed; the best take is delivered."""

    at_least: dict[Metric, float] = {}
    at_most: dict[Metric, float] = {}
    max_takes: int = Field(3, ge=1)  # of an item, the first one included


class ScoreConfig(Settings):
    """What a third array measures of the delivered videos; no pixels, so a run may be scored anew in another way."""

    metrics: tuple[Metric, ...] = ()  # none: no third array
    models: ScoreModelsConfig = ScoreModelsConfig()
    batch_size: int = Field(8, ge=1)  # frames, or pairs of frames, on the device at once
    accept: AcceptConfig = AcceptConfig()

    @field_validator("metrics", mode="before")
    @classmethod
    def _all(cls, metrics: object) -> object:
        return get_args(Metric) if metrics == "all" else metrics

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"found a metric twice in {', '.join(metrics)}; name each once")
        return metrics

    @model_validator(mode="after")
    def _rules_are_measured(self) -> Self:
        for metric in (*self.accept.at_least, *self.accept.at_most):
            if metric not in self.metrics:
                raise ValueError(f"accept: found a rule for {metric}, which is not measured; add it to metrics")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What is measured of a run's videos, and by which weights. Unlike a config it may change: no pixel depends on it."""

    config: ScoreConfig
    weights: dict[str, str]  # folder name -> fingerprint

    @property
    def digest(self) -> str:
        """12 hex digits; names the folder of these scores. Rules are about scores, they change none."""
        measured = self.config.model_dump(mode="json", exclude={"accept"})
        text = json.dumps({"config": measured, "weights": self.weights}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class RunConfig(Settings):
    """Everything that may change a pixel of a run, and what is measured of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    seed: int = 2025
    testset: TestsetConfig
    faces: FacesConfig = FacesConfig()
    decouple: DecoupleConfig = DecoupleConfig()
    cutout: CutoutConfig = CutoutConfig()
    hyperlora: HyperLoRAConfig = HyperLoRAConfig()
    first_frame: FirstFrameConfig = FirstFrameConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    video: VideoConfig = VideoConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    score: ScoreConfig = ScoreConfig()

    @model_validator(mode="after")
    def _no_float16_by_zero3(self) -> Self:
        # transformers then keeps UMT5's `wo` in float32 (_keep_in_fp32_modules), and under DeepSpeed 0.19.8 it cannot
        if self.text_encoder.weights_sharding == "zero3" and self.video.dtype == "float16":
            raise ValueError(
                "text_encoder.weights_sharding: found 'zero3' with video.dtype 'float16', in which it would give other "
                "embeddings; set video.dtype to bfloat16 or float32, or weights_sharding to none"
            )
        return self

    @property
    def starts_from_first_frame(self) -> bool:
        """Whether array 1 paints; reference-to-video needs no painting, and no spatial prompt."""
        return self.video.condition != "reference"

    @property
    def asks_llm(self) -> bool:
        """Whether a prompt goes through the LLM at all."""
        return self.starts_from_first_frame or self.decouple.prompts == "refined"


SettingsT = TypeVar("SettingsT", bound=Settings)

_MERGE_TAG = "tag:yaml.org,2002:merge"  # of the key <<, which may stand twice: all of them count


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but for a key that stands twice in one mapping: the last would win, and the first be lost."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # here, not where mappings are constructed: << has put the keys of others among them by then
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"line {line}: found the key {key.value!r} again, first in line {lines[name]}; keep one")
            lines[name] = line
        return node


def _load_yaml(text: str) -> Any:
    """What YAML text says. Raises yaml.YAMLError or ValueError if it is not readable."""
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader, with no constructor more
    except RecursionError:
        raise ValueError("blocks or brackets are nested too deeply") from None


def load_settings(kind: type[SettingsT], path: Path, overrides: tuple[str, ...] = ()) -> SettingsT:
    """The settings in a YAML file, with `key.sub=value` overrides on top.

    Raises ValueError, one line, naming file and key, if the file is absent, no YAML mapping, or does not fit `kind`.
    """
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such settings file") from None
    except OSError as error:  # a folder, a name that is too long, no permission
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a YAML file that you may read") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that does not exist
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found {type(values).__name__}, expected a mapping of keys to values")
    for override in overrides:
        _set_value(values, override)
    return parse_settings(kind, values, where=str(path))


def parse_settings(kind: type[SettingsT], values: dict[str, Any], *, where: str) -> SettingsT:
    """`values` as `kind`; ValueError in one line if they do not fit."""
    strangers = [key for key in values if not isinstance(key, str)]
    if strangers:
        raise ValueError(f"{where}: {strangers[0]}: found a key that is no text, expected a string; take it out or quote it")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_problem(kind, error)}") from None


def dump_settings(settings: Settings) -> str:
    """YAML text that load_settings turns into equal settings, every default written out."""
    # escaped to ASCII: PyYAML reads some characters (U+0085) otherwise than it has written them
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def run_digest(config: RunConfig, *, manifest_digest: str, weights: dict[str, str]) -> str:
    """64 hex digits over what may change a pixel: settings, the test set's content, the weights' content.

    The run's name, the test set's place and the scores are left out: renaming, moving or measuring makes no other video.
    """
    pixels = config.model_dump(exclude={"name": True, "testset": True, "score": True})
    text = json.dumps({"config": pixels, "manifest": manifest_digest, "weights": weights}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _set_value(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"override {override!r}: expected key.sub=value, for example video.num_frames=49")
    *blocks, last = name.split(".")
    for block in blocks:
        values = values.setdefault(block, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {block} is a value, not a block of keys")
    try:
        values[last] = _load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"override {override!r}: value not readable as YAML: {' '.join(str(error).split())}") from None


def _first_problem(kind: type[Settings], error: ValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = known_keys(kind)
        return f"{name}: unknown key; {nearest(name, known)}"
    if problem["type"] == "missing":
        return f"{name}: missing; add it"
    text = problem["msg"].removeprefix("Value error, ")
    if not name:  # of the whole: the text names the key
        return text
    return f"{name}: {text}" if problem["type"] == "value_error" else f"{name}: found {problem['input']!r}; {text}"


def nearest(name: str, known: list[str]) -> str:
    """Text that says which known key is nearest to `name`, or lists all when none is near."""
    last = {key.rpartition(".")[2]: key for key in known}
    matches = difflib.get_close_matches(name, known, 1, 0.75) or [
        last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], list(last), 1, 0.6)
    ]
    return f"nearest known key is {matches[0]}" if matches else f"known: {', '.join(known)}"


def known_keys(kind: type[Settings], prefix: str = "") -> list[str]:
    """Every key of `kind` as key.sub."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys
