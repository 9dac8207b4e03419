"""How well every place of one feature map matches every place of another, and reading that around a guess.

Knows no network. After RAFT (Teed and Deng 2020, arXiv 2003.12039, section 3.2); AMT (Li et al. 2023) looks up the same way.

Legend: B pairs, C channels, h w cells of the feature maps, P = h*w places, r radius of the window, 2 = x then y in cells.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

NUM_LEVELS = 4  # of the pyramid; RAFT core/raft.py corr_levels, amt-s.yaml corr_lvls
# feature maps are 1/8 of the frame, and the last of 4 levels 1/8 of those: below 2 cells there its coordinates divide by zero
MIN_SIDE_PIXELS = 2 * 8 * 2 ** (NUM_LEVELS - 1)


def grid_2hw(map_BChw: torch.Tensor) -> torch.Tensor:
    """The coordinates of each cell of a map, x then y."""
    h, w = map_BChw.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, dtype=map_BChw.dtype, device=map_BChw.device),
        torch.arange(w, dtype=map_BChw.dtype, device=map_BChw.device),
        indexing="ij",
    )
    return torch.stack([x, y])


def correlation_BPhw(first_BChw: torch.Tensor, second_BChw: torch.Tensor) -> torch.Tensor:
    """For every place of the first map, an image over the second: dot products over the square root of C."""
    _, channels, h, w = first_BChw.shape
    products_BPP = first_BChw.flatten(2).transpose(1, 2) @ second_BChw.flatten(2)
    return products_BPP.unflatten(2, (h, w)) / math.sqrt(channels)


def pyramid(volume_BPhw: torch.Tensor) -> list[torch.Tensor]:
    """The volume as B*P one-channel images, then each time half as wide and high; an odd last row or column is left out."""
    levels = [volume_BPhw.flatten(0, 1).unsqueeze(1)]
    for _ in range(NUM_LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def look_up(levels: list[torch.Tensor], centre_B2hw: torch.Tensor, radius: int) -> torch.Tensor:
    """[B, levels*(2r+1)^2, h, w]: the window around each place's centre, level by level; zero outside the map.

    In a window the x offset is the slow index and the y offset the fast one: published weights expect this order.
    """
    batch, _, h, w = centre_B2hw.shape
    steps = torch.arange(-radius, radius + 1, dtype=centre_B2hw.dtype, device=centre_B2hw.device)
    dx_NN, dy_NN = torch.meshgrid(steps, steps, indexing="ij")
    x_P11, y_P11 = (centre_B2hw[:, axis].reshape(-1, 1, 1) for axis in (0, 1))
    windows = []
    for level, images_P1HW in enumerate(levels):
        height, width = images_P1HW.shape[-2:]
        x_PNN = 2 * (x_P11 / 2**level + dx_NN) / (width - 1) - 1
        y_PNN = 2 * (y_P11 / 2**level + dy_NN) / (height - 1) - 1
        grid_PNN2 = torch.stack([x_PNN, y_PNN], dim=-1)
        window_P1NN = F.grid_sample(images_P1HW, grid_PNN2, align_corners=True)
        windows.append(window_P1NN.reshape(batch, h, w, -1))
    return torch.cat(windows, dim=-1).permute(0, 3, 1, 2).contiguous()


def radius_of(num_values: int) -> int:
    """The radius of a lookup that gives that many values per place. Raises ValueError if no radius does."""
    side = math.isqrt(num_values // NUM_LEVELS)
    if side % 2 == 0 or NUM_LEVELS * side**2 != num_values:
        raise ValueError(f"{num_values} values of correlation: expected {NUM_LEVELS}*(2r+1)^2, such as 196 or 324")
    return side // 2


def check_sides(frame_BCHW: torch.Tensor, multiple: int) -> None:
    """Raise ValueError unless both sides are multiples, and long enough for the pyramid's last level."""
    height, width = frame_BCHW.shape[-2:]
    if height % multiple or width % multiple or min(height, width) < MIN_SIDE_PIXELS:
        raise ValueError(
            f"frames of {width}x{height}: expected multiples of {multiple}, at least {MIN_SIDE_PIXELS}; pad them first"
        )
