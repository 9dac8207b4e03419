"""Size and sha256 of the published files of weights, as far as they are known; nothing else.

They are those of the publishers' git-lfs pointers, of the files of insightface's archives and of OpenAI's, as public programs
and pages quote them. Revised texts (config.json, README) come and go with a repository; tensors do not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """A row of the table."""

    path: str  # below the folder of weights
    size: int | None  # bytes
    rounded: bool  # the size is known to three digits only
    sha256: str | None


# [folder], then size in bytes, sha256 and name of its files; ~ is a rounded size, - is not known
_TABLE = """
[antelopev2]
16923827 5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91 scrfd_10g_bnkps.onnx
5030888 f001b856447c413801ef5c42091ed0cd516fcd21f2d6b79635b1e733a7109dbf 2d106det.onnx
1322532 4fde69b1c810857b88c64a335084f1c3fe8f01246c9a191b48c7bb756d6652fb genderage.onnx
260665334 4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf glintr100.onnx

[Qwen3-8B]
728 f7c4eadfbbf522470667b797a3c89be2524832d2d599797248dc304fff447c30 config.json
239 2325da0f15bb848e018c5ae071b7943332e9f871d6b60e2ed22ca97d4cb993d2 generation_config.json
9732 d5d09f07b48c3086c508b30d1c9114bd1189145b74e982a265350c923acd8101 tokenizer_config.json
11422654 aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4 tokenizer.json
2776833 ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910 vocab.json
1671853 8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5 merges.txt
32878 f9fdbcb91c23971c13ec5d5f2573d2349e8f61f2f049371ec699281748fdb1bc model.safetensors.index.json
3996250744 31d6a825ae35f11fb85b195b4c42c146c051e446433125a215336abdf95cbf5f model-00001-of-00005.safetensors
3993160032 5991236cea6fe21f3d43cab0f0e84448734fbbe0789816202989f2ddc9d18282 model-00002-of-00005.safetensors
3959604768 c5185c4794be2d8a9784d5753c9922db38df478ce11f9ed0b415b7304d896836 model-00003-of-00005.safetensors
3187841392 b5ee7de71fbf17db3d5704e0c8f2bc7d005ca9e1d7ca2aeb19827b0cfcaa917a model-00004-of-00005.safetensors
1244659840 20c2d6366ab85c90786ccdd829cd2b9e7d30ef3b2ebbb998280e7e4014b542ff model-00005-of-00005.safetensors

[HRNetV2-W48]
- - hrnet_lip_5583_torch04.pth

[HyperLoRA/hyper_lora/clip_processor/clip_vit_large_14_processor]
316 910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd preprocessor_config.json
[HyperLoRA/hyper_lora/clip_vit/clip_vit_large_14]
- 8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a config.json
1710540580 a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb model.safetensors
[HyperLoRA/hyper_lora/hyper_lora/sdxl_hyper_id_lora_v1_fidelity]
18378 - hyper_lora_modules.json
~2970000000 - hyper_lora_modules.safetensors
~16800000 - id_projector.safetensors
~150000000 - resampler.safetensors
[HyperLoRA/hyper_lora/hyper_lora/sdxl_hyper_id_lora_v1_edit]
18378 - hyper_lora_modules.json
~2970000000 - hyper_lora_modules.safetensors
~16800000 - id_projector.safetensors
~150000000 - resampler.safetensors

[RealVisXL_V4.0]
577 - model_index.json
[RealVisXL_V4.0/scheduler]
- - scheduler_config.json
[RealVisXL_V4.0/tokenizer]
- - tokenizer_config.json
- - special_tokens_map.json
- - vocab.json
- - merges.txt
[RealVisXL_V4.0/tokenizer_2]
- - tokenizer_config.json
- - special_tokens_map.json
- - vocab.json
- - merges.txt
[RealVisXL_V4.0/text_encoder]
- - config.json
~492000000 c4cc307234f0bdbf4f078ca9d62efc6d6f58995d25f1be1626db13bf1d5ae0d6 model.safetensors
[RealVisXL_V4.0/text_encoder_2]
- - config.json
~2780000000 12837bb720fa6758ea501af6fc19e8ef95642f409e82833cb9bee97bfc58ece0 model.safetensors
[RealVisXL_V4.0/unet]
- - config.json
~10300000000 8924e82b9cab81e8eadeddc78faee044e99e89ff46a3106e29f1d0c840920bc0 diffusion_pytorch_model.safetensors
[RealVisXL_V4.0/vae]
602 - config.json
~335000000 - diffusion_pytorch_model.safetensors

[Wan2.1-VACE-14B-diffusers/scheduler]
- - scheduler_config.json
[Wan2.1-VACE-14B-diffusers/tokenizer]
- - tokenizer_config.json
- - special_tokens_map.json
- - spiece.model
16837459 20a46ac256746594ed7e1e3ef733b83fbc5a6f0922aa7480eda961743de080ef tokenizer.json
[Wan2.1-VACE-14B-diffusers/text_encoder]
- - config.json
- - model.safetensors.index.json
- - model-00001-of-00003.safetensors
4983103192 d57d948ece4837d850b7a859a4415121d57cacf8b9ee1d4db200c67f592902d7 model-00002-of-00003.safetensors
1442935480 0da9ee284e21d1406df708788db1d502d95d75f69faa25cd26151bf8829b7c5f model-00003-of-00003.safetensors
[Wan2.1-VACE-14B-diffusers/transformer]
- - config.json
- - diffusion_pytorch_model.safetensors.index.json
4867114424 bd8bbb8834a274525ab65cbb063f21aa58973a054bfd1638bfe395504c9d9b99 diffusion_pytorch_model-00001-of-00013.safetensors
4919594456 8d24b40a5ea6bb21cdc0115128241ffeb44184b2419f4b1585af1573ed5c7839 diffusion_pytorch_model-00002-of-00013.safetensors
- - diffusion_pytorch_model-00003-of-00013.safetensors
- - diffusion_pytorch_model-00004-of-00013.safetensors
- - diffusion_pytorch_model-00005-of-00013.safetensors
- - diffusion_pytorch_model-00006-of-00013.safetensors
- - diffusion_pytorch_model-00007-of-00013.safetensors
4919594552 333eaca9dce56bf3083bbab4630aa081b7c403a27ba94894a7756d631529fd9a diffusion_pytorch_model-00008-of-00013.safetensors
4919465224 8af811e7ed2ab64a3f6d07827d1b975a9804b78d63c2b3989024bc1b67ac6e5d diffusion_pytorch_model-00009-of-00013.safetensors
4919594552 e8b631e38f0ad21a63c631069658d4be4b55e0cb15e8f5848567482b5862ba63 diffusion_pytorch_model-00010-of-00013.safetensors
4919465224 21032fe150df6f3ac26780fb8ca38d05c4a9585a1b774ceadb5d42bc96ff1b27 diffusion_pytorch_model-00011-of-00013.safetensors
- - diffusion_pytorch_model-00012-of-00013.safetensors
4217957112 e0e39ee859fc696ebd2c0982202a5d1cf8206eeb82b3b582d954707b9f980f12 diffusion_pytorch_model-00013-of-00013.safetensors
[Wan2.1-VACE-14B-diffusers/vae]
- - config.json
507591892 d6e524b3fffede1787a74e81b30976dce5400c4439ba64222168e607ed19e793 diffusion_pytorch_model.safetensors

[Wan2.1-VACE-1.3B-diffusers/scheduler]
- - scheduler_config.json
[Wan2.1-VACE-1.3B-diffusers/tokenizer]
- - tokenizer_config.json
- - special_tokens_map.json
- - spiece.model
- - tokenizer.json
[Wan2.1-VACE-1.3B-diffusers/text_encoder]
- - config.json
- - model.safetensors.index.json
4935812536 - model-00001-of-00003.safetensors
4983103192 - model-00002-of-00003.safetensors
1442935480 - model-00003-of-00003.safetensors
[Wan2.1-VACE-1.3B-diffusers/transformer]
- - config.json
- - diffusion_pytorch_model.safetensors.index.json
4999964504 192804a4e10b5bb0a13f5c224bc4ec9707b3b8cc0def8eea005dbce7c9d6752a diffusion_pytorch_model-00001-of-00002.safetensors
2146103400 dadaf1d5e9ccf826e2c497aa9fc2756a044f606d0aa919e5405a734a121bcf7e diffusion_pytorch_model-00002-of-00002.safetensors
[Wan2.1-VACE-1.3B-diffusers/vae]
- - config.json
507591892 - diffusion_pytorch_model.safetensors

[buffalo_l]
16923827 5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91 det_10g.onnx
5030888 f001b856447c413801ef5c42091ed0cd516fcd21f2d6b79635b1e733a7109dbf 2d106det.onnx
1322532 4fde69b1c810857b88c64a335084f1c3fe8f01246c9a191b48c7bb756d6652fb genderage.onnx
174383860 4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43 w600k_r50.onnx

[CurricularFace]
~261000000 - glint360k_curricular_face_r101_backbone.bin

[Inception-v3]
108949747 - inception_v3_google-0cc3c7bd.pth

[ViCLIP]
1710545812 7a4d6ad6eac6632db3693f4b97f9f8f6445b65b1e139a6fc6686150522238c56 ViClip-InternVid-10M-FLT.pth
1356917 924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a bpe_simple_vocab_16e6.txt.gz

[CLIP-ViT-L-14]
932768134 b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836 ViT-L-14.pt

[CLIP-ViT-B-32]
353976522 40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af ViT-B-32.pt
1356917 924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a bpe_simple_vocab_16e6.txt.gz

[LAION-aesthetic]
4071 2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba sa_0_4_vit_l_14_linear.pth

[MUSIQ-SPAQ]
108610983 358bb6af275e28ea56821d44fb55c6cb83645db11f394d3ad65b2d149965ab50 musiq_spaq_ckpt-358bb6af.pth

[AMT-S]
12038359 07e7e03405c213fe4405678db9b42d05671e48c56faf6a441b99bb0047d3cf77 amt-s.pth

[RAFT-things]
21108000 fcfa4125d6418f4de95d84aec20a3c5f4e205101715a79f193243c186ac9a7e1 raft-things.pth
"""


@functools.cache
def published_files(folder: str) -> tuple[PublishedFile, ...]:
    """The table's rows of a folder of weights; () if it has none."""
    rows, heading = [], ""
    for line in filter(None, _TABLE.splitlines()):
        if line.startswith("["):
            heading = line[1:-1] + "/"
            continue
        size, sha256, name = line.split()
        path = heading + name
        if path.startswith(f"{folder}/"):
            rows.append(
                PublishedFile(
                    path=path.removeprefix(f"{folder}/"),
                    size=None if size == "-" else int(size.lstrip("~")),
                    rounded=size.startswith("~"),
                    sha256=None if sha256 == "-" else sha256,
                )
            )
    return tuple(rows)
