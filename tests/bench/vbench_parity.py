"""How far our five scores are from VBench's own code, on equal random weights of full size and clips that each decodes itself.

    python3.11 -m venv --without-pip /tmp/vb
    echo "import site; site.addsitedir('OUR_VENV/lib/python3.11/site-packages')" > /tmp/vb/lib/python3.11/site-packages/ours.pth
    /tmp/vb/bin/python -m pip install --no-deps vbench==0.1.5 torchvision==0.28.0 decord==0.6.0 easydict openai-clip==1.0.1 \
        pyiqa==0.1.16 timm==1.0.31 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 pandas
    /tmp/vb/bin/python tests/bench/vbench_parity.py /tmp/parity --head sa_0_4_vit_l_14_linear.pth [--metrics dd]

That environment is to be thrown away; AMT and pyiqa are for research only, nothing of theirs may be copied. Both codes read the
same files, 2.8 GB of seeded weights in the published layouts; the aesthetic head is the real one. VBench runs by its compute_*
functions, on a CPU, unchanged but for what make_importable declares. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import packaging.version
import torch
import torch.nn.functional as F
from torch import nn

from ipt2v.config import Metric, ScoreConfig
from ipt2v.metrics import motion, toy_motion, toy_quality
from ipt2v.metrics.amt import AMT, AMTSize, UpdateSize
from ipt2v.metrics.clip import CLIP, ImageSize, TextSize, TransformerSize
from ipt2v.metrics.delivered import Delivered
from ipt2v.metrics.measures import FAMILIES
from ipt2v.metrics.musiq import MUSIQ, MUSIQSize
from ipt2v.metrics.raft import RAFT, EncoderSize, RAFTSize
from ipt2v.metrics.viclip import ViCLIP
from ipt2v.models.score_weights import VOCABULARY, file_of, roles_of
from ipt2v.mp4 import read_fps, read_mp4, write_mp4

CPU, CONFIG = torch.device("cpu"), ScoreConfig()
TOLERANCES: dict[Metric, float] = {"dd": 1e-3, "ms": 2e-4, "iq": 1e-3, "aq": 1e-4, "oc": 1e-4}  # of dd: relative, of a pair
ROLES = roles_of(TOLERANCES)
PROMPTS = (
    "A woman walks.",
    "In a café the man (32 years old; in navy-blue) doesn't hurry: he stirs, looks up, smiles &amp; waves, then walks out.",
)
CLIPS = {  # frames, height, width, fps, pixels a frame (None: noise)
    "slow": (17, 144, 192, 8, 1),
    "fast": (25, 128, 160, 16, 6),
    "static": (17, 144, 192, 24, 0),
    "noise": (18, 130, 166, 16, None),  # both networks of motion have to pad it
    "square": (17, 256, 256, 24, 3),
    "real": (5, 480, 832, 16, 4),  # IQ makes it smaller, and OC repeats its last frame
}


def write_clip(path: Path, num_frames: int, height: int, width: int, fps: int, speed: int | None) -> None:
    """A smooth texture that slides to the left and, half as fast, up; without a speed noise, anew in every frame."""
    generator = torch.Generator().manual_seed(7)
    frames_THWC = torch.randint(256, (num_frames, height, width, 3), generator=generator, dtype=torch.uint8)
    if speed is not None:
        canvas_BCHW = F.interpolate(torch.rand(1, 3, 80, 120, generator=generator), scale_factor=9, mode="bicubic")
        canvas_HWC = 255 * canvas_BCHW[0].permute(1, 2, 0).clamp(0, 1)
        for t, frame_HWC in enumerate(frames_THWC):
            frame_HWC.copy_(canvas_HWC[t * speed // 2 :, t * speed :][:height, :width])
    write_mp4(path, frames_THWC.numpy(), fps=fps, crf=18)


def networks() -> tuple[nn.Module, ...]:
    """RAFT, AMT, MUSIQ, ViCLIP and CLIP of their published sizes, without tensors."""
    things = EncoderSize(widths=(64, 96, 128), out=256)
    channels = {"correlation": (256, 192), "flow": (128, 64), "motion": 126, "hidden": 128, "flow_head": 256, "mask_head": 256}
    update = UpdateSize(correlation=64, flow=(40, 20), motion=68, hidden=76)
    widths = {"feature_widths": (32, 64, 96), "features": 84, "pyramid": (20, 32, 44, 56), "decoders": (60, 96, 132, 112)}
    spaq = MUSIQSize(stem_width=64, block_width=256, width=384, mlp_width=1152, num_blocks=14, num_heads=6)
    small = TransformerSize(width=768, mlp_width=3072, num_blocks=12, num_heads=12)
    large = TransformerSize(width=1024, mlp_width=4096, num_blocks=24, num_heads=16)
    image = ImageSize(transformer=large, patch=14, grid=16, out_width=768)
    texts = [TextSize(transformer=small, context=context, vocabulary=49_408, out_width=768) for context in (32, 77)]
    with torch.device("meta"):
        raft = RAFT(RAFTSize(features=things, context=things, radius=4, **channels))
        amt = AMT(AMTSize(update=update, side=20, radius=3, num_hypotheses=3, comb=18, **widths))
        return raft, amt, MUSIQ(spaq), ViCLIP(texts[0], image, 8), CLIP(texts[1], image)


def write_weights(weights_dir: Path, head: Path) -> None:
    """All five, drawn as the toys are, and two files that are real: the head and CLIP's merges."""
    raft, amt, musiq, viclip, clip = networks()
    path_of = {role: file_of(role, weights_dir, CONFIG) for role in ROLES}
    for path in path_of.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(files("clip") / VOCABULARY), path_of["viclip"].parent)
    shutil.copy(head, path_of["aesthetic"])
    tensors = toy_motion.drawn(raft, 1)
    tensors |= {key: 0.0105 * tensors[key] for key in tensors if "flow_head.conv2." in key}  # scores around the thresholds
    tensors |= {key: tensors[key.replace(".norm3.", ".downsample.1.")] for key in tensors if ".norm3." in key}
    torch.save({f"module.{key}": tensor for key, tensor in tensors.items()}, path_of["raft"])
    tensors = toy_motion.drawn(amt, 2)
    for index in (4, 3, 2):
        tensors[f"decoder{index}.convblock.2.weight"][:, :4] *= 0.02  # flows of some pixels
        tensors[f"update{index}.flow_head.2.weight"] *= 0.02
    tensors["decoder1.convblock.2.weight"] *= 0.002  # neither black nor white
    tensors["comb_block.2.weight"] *= 0.05
    torch.save({"state_dict": tensors}, path_of["amt"])
    tensors = toy_quality.drawn(musiq, 3)
    tensors["head.bias"].fill_(50)
    torch.save(tensors, path_of["musiq"])
    torch.save({"model": toy_quality.drawn(viclip, 4)}, path_of["viclip"])
    torch.jit.save(as_torchscript(toy_quality.drawn(clip, 5)), path_of["clip_l"])


def as_torchscript(tensors: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """An archive in half precision like OpenAI's, except that it can compute nothing."""
    root = nn.Module()
    for key, tensor in tensors.items():
        *names, last = key.split(".")
        module = root
        for name in names:
            module = module._modules.setdefault(name, nn.Module())
        module.register_parameter(last, nn.Parameter(tensor.half(), requires_grad=False))
    return torch.jit.script(root)


def make_importable(cache_dir: Path) -> None:
    """What VBench and openai-clip miss under a CPU build of torch and setuptools >= 82, declared; nothing here calls it."""
    os.environ["VBENCH_CACHE_DIR"] = str(cache_dir)
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["pkg_resources"] = SimpleNamespace(packaging=packaging)


def theirs(metric: Metric, jobs: list[tuple[Path, str]], weights_dir: Path) -> list[tuple[float, ...]]:
    """What VBench's compute_<dimension> says of each MP4 and prompt; after a verdict the scores of all pairs of frames."""
    read = {role: str(file_of(role, weights_dir, CONFIG)) for role in ROLES}
    dimension, submodules = {  # as init_submodules of vbench/utils.py
        "dd": ("dynamic_degree", {"model": read["raft"]}),
        "ms": ("motion_smoothness", {"config": str(files("vbench") / "third_party/amt/cfgs/AMT-S.yaml"), "ckpt": read["amt"]}),
        "iq": ("imaging_quality", {"model_path": read["musiq"]}),
        "aq": ("aesthetic_quality", [read["clip_l"], str(Path(read["aesthetic"]).parent)]),
        "oc": ("overall_consistency", {"pretrain": read["viclip"]}),
    }[metric]
    info = [{"prompt_en": prompt, "dimension": [dimension], "video_list": [str(path)]} for path, prompt in jobs]
    (weights_dir / "info.json").write_text(json.dumps(info))
    module = import_module(f"vbench.{dimension}")
    pairs: list[list[float]] = [[] for _ in jobs]
    if metric == "dd":
        pairs, check_move = [], module.DynamicDegree.check_move
        module.DynamicDegree.check_move = lambda self, scores: pairs.append(scores) or check_move(self, scores)
    _, results = getattr(module, f"compute_{dimension}")(str(weights_dir / "info.json"), CPU, submodules)
    return [(float(found["video_results"]), *scores) for found, scores in zip(results, pairs, strict=True)]


def ours(metric: Metric, jobs: list[tuple[Path, str]], weights_dir: Path) -> list[tuple[float, ...]]:
    """The same from our score stage."""
    measure = next(family.load for family in FAMILIES if metric in family.metrics)(CONFIG, weights_dir, CPU)
    pairs, verdict = list[float](), motion.verdict
    motion.verdict = lambda scores, **sides: pairs.extend(scores) or verdict(scores, **sides)
    scores: list[tuple[float, ...]] = []
    for path, prompt in jobs:
        frames_THWC = read_mp4(path)
        seen = {"frames_THWC": torch.from_numpy(frames_THWC), "fps": read_fps(path), "prompt": prompt}
        video = Delivered(**seen, reference_HWC=frames_THWC[0], first_frame_HWC=None)
        score = measure(video, {metric})[metric]
        assert isinstance(score, float), score
        scores.append((100 * score if metric == "iq" else score, *pairs))  # of one video VBench writes IQ of 100
        pairs.clear()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--metrics", nargs="+", choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    arguments = parser.parse_args()
    make_importable(arguments.folder)
    if not file_of("clip_l", arguments.folder, CONFIG).exists():
        write_weights(arguments.folder, arguments.head)
    paths = [arguments.folder / f"{name}.mp4" for name in arguments.clips]
    for path in paths:
        write_clip(path, *CLIPS[path.stem])
    for metric in arguments.metrics:
        jobs = [(path, prompt) for prompt in (PROMPTS if metric == "oc" else ("",)) for path in paths]
        both = zip(theirs(metric, jobs, arguments.folder), ours(metric, jobs, arguments.folder), strict=True)
        for (path, prompt), ((a, *pairs_a), (b, *pairs_b)) in zip(jobs, both, strict=True):
            difference = max(abs(a - b), *(abs(x - y) / x for x, y in zip(pairs_a, pairs_b, strict=True)), 0)
            note = f"{len(pairs_a)} pairs, {min(pairs_a):.2f} to {max(pairs_a):.2f} pixels" if pairs_a else prompt[:14]
            verdict = "ABOVE" if difference > TOLERANCES[metric] else "within"
            line = f"{metric} {path.stem:6} VBench {a:.7f} ours {b:.7f} difference {difference:.1e} {verdict}"
            print(f"{line} {TOLERANCES[metric]:.0e} {note}", flush=True)


if __name__ == "__main__":
    main()
