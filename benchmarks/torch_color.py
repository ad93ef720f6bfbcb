"""The colours of vivi_jax/augment in PyTorch, so that the steps that ours are timed against do the same work.

Images are three planes [N, P], one per channel, whose P are the pixels of an image, or of all frames of a clip.
Parameters are [N, 1], one per row. benchmarks.gpu compiles these functions, as it does the networks.
"""

import torch

from vivi_jax.augment import byol, vdim

Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# ---- Whole augmentations, with their random draws --------------------------------------------------------------------
def byol_views(views_BxVxHxWx3: torch.Tensor) -> torch.Tensor:
    """augment.byol.byol_views: uint8 -> float32 [V, B, H, W, 3] in [0, 1]."""
    views_VxBxHxWx3 = views_BxVxHxWx3.transpose(0, 1)
    views, batch, height, width, _ = views_VxBxHxWx3.shape
    rows, device = views * batch, views_BxVxHxWx3.device

    def chance(name: str) -> torch.Tensor:
        of_views = torch.tensor([row[name] for row in byol.BYOL_VIEWS[:views]], device=device)
        return coin(of_views.repeat_interleave(batch)[:, None])

    images = split(views_VxBxHxWx3.flatten(0, 1))
    a1 = {name: byol.BYOL_A1[name] for name in ("brightness", "contrast", "saturation", "hue")}  # of A2 too
    images = choose(chance("jitter_prob"), color_jitter(images, **a1), images)
    images = choose(chance("grey_prob"), grey(images), images)
    x_Nx3xHxW = torch.stack(images, dim=1).unflatten(2, (height, width))
    sigma = uniform(rows, 0.1, 2.0, device) * height / 224
    blurred = gaussian_blur(x_Nx3xHxW, sigma, radius=int(height / 10 / 2))
    x_Nx3xHxW = torch.where(chance("blur_prob")[..., None, None], blurred, x_Nx3xHxW)
    solarized = torch.where(x_Nx3xHxW < 0.5, x_Nx3xHxW, 1 - x_Nx3xHxW)
    x_Nx3xHxW = torch.where(chance("solarize_prob")[..., None, None], solarized, x_Nx3xHxW)
    return x_Nx3xHxW.clamp(0, 1).permute(0, 2, 3, 1).unflatten(0, (views, batch))


def inception(images_NxHxWx3: torch.Tensor) -> torch.Tensor:
    """augment.vivi's "inception": uint8 -> float32 [N, H, W, 3] in [0, 1]."""
    rows, device = len(images_NxHxWx3), images_NxHxWx3.device
    shift, factor = uniform(rows, -32 / 255, 32 / 255, device), uniform(rows, 0.5, 1.5, device)
    planes = shift_and_saturate(split(images_NxHxWx3), shift, factor)
    return torch.stack(planes, dim=-1).view(images_NxHxWx3.shape)


def jitter_grey(clips_BxTxHxWx3: torch.Tensor) -> torch.Tensor:
    """augment.vdim's "jitter_grey": uint8 -> float32 [B, T, H, W, 3] in [0, 1], one draw per clip."""
    amdim, rows = dict(vdim.AMDIM), len(clips_BxTxHxWx3)
    jitter_prob, grey_prob = (
        torch.full((rows, 1), amdim.pop(name), device=clips_BxTxHxWx3.device) for name in ("jitter_prob", "grey_prob")
    )
    clips = split(clips_BxTxHxWx3)
    clips = choose(coin(jitter_prob), torchvision_jitter(clips, **amdim), clips)
    clips = choose(coin(grey_prob), grey(clips), clips)
    return torch.stack(clips, dim=-1).view(clips_BxTxHxWx3.shape)


def color_jitter(planes: Planes, *, brightness: float, contrast: float, saturation: float, hue: float) -> Planes:
    """augment.color.color_jitter."""
    rows, device = len(planes[0]), planes[0].device
    return jitter_in_order(
        planes,
        torch.rand(rows, 4, device=device).argsort(dim=1),
        shift=uniform(rows, -brightness, brightness, device),
        contrast_factor=uniform(rows, 1 - contrast, 1 + contrast, device),
        saturation_factor=uniform(rows, 1 - saturation, 1 + saturation, device),
        hue_shift=uniform(rows, -hue, hue, device),
    )


def torchvision_jitter(planes: Planes, *, brightness: float, contrast: float, saturation: float, hue: float) -> Planes:
    """augment.color.torchvision_jitter."""
    rows, device = len(planes[0]), planes[0].device
    return torchvision_jitter_in_order(
        planes,
        torch.rand(rows, 4, device=device).argsort(dim=1),
        factors=[uniform(rows, 1 - x, 1 + x, device) for x in (brightness, contrast, saturation)],
        hue_shift=uniform(rows, -hue, hue, device),
    )


def uniform(rows: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    return low + (high - low) * torch.rand(rows, 1, device=device)


def coin(probability_Nx1: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(probability_Nx1) < probability_Nx1


# ---- Operations, without chance --------------------------------------------------------------------------------------
def split(images: torch.Tensor) -> Planes:
    """uint8 [N, ..., 3] -> planes in [0, 1]."""
    red, green, blue = (images[..., channel].flatten(1).float() / 255 for channel in range(3))
    return red, green, blue


def choose(condition_Nx1: torch.Tensor, planes: Planes, others: Planes) -> Planes:
    red, green, blue = (torch.where(condition_Nx1, a, b) for a, b in zip(planes, others, strict=True))
    return red, green, blue


def clipped(*planes: torch.Tensor) -> Planes:
    red, green, blue = (plane.clamp(0, 1) for plane in planes)
    return red, green, blue


def jitter_in_order(
    planes: Planes,
    order_Nx4: torch.Tensor,
    *,
    shift: torch.Tensor,
    contrast_factor: torch.Tensor,
    saturation_factor: torch.Tensor,
    hue_shift: torch.Tensor,
) -> Planes:
    """augment.color.jitter_in_order."""
    for turn in order_Nx4.split(1, dim=1):
        planes = clipped(*(plane + torch.where(turn == 0, shift, 0.0) for plane in planes))
        factor = torch.where(turn == 1, contrast_factor, 1.0)
        means = [plane.mean(dim=1, keepdim=True) for plane in planes]
        planes = clipped(*((plane - mean) * factor + mean for plane, mean in zip(planes, means, strict=True)))
        saturate, turn_hue = torch.where(turn == 2, saturation_factor, 1.0), torch.where(turn == 3, hue_shift, 0.0)
        planes = clipped(*adjust_hsv(planes, saturate, turn_hue))
    return planes


def torchvision_jitter_in_order(
    planes: Planes, order_Nx4: torch.Tensor, *, factors: list[torch.Tensor], hue_shift: torch.Tensor
) -> Planes:
    """augment.color.torchvision_jitter_in_order."""
    for turn in order_Nx4.split(1, dim=1):
        factor = [torch.where(turn == i, value, 1.0) for i, value in enumerate(factors)]
        planes = clipped(*(plane * factor[0] for plane in planes))
        mean = luma(planes).mean(dim=1, keepdim=True)
        planes = clipped(*(mean + (plane - mean) * factor[1] for plane in planes))
        of_pixels = luma(planes)
        planes = clipped(*(of_pixels + (plane - of_pixels) * factor[2] for plane in planes))
        turn_hue = torch.where(turn == 3, hue_shift, 0.0)
        planes = clipped(*adjust_hsv(planes, torch.ones_like(turn_hue), turn_hue))
    return planes


def shift_and_saturate(planes: Planes, shift: torch.Tensor, factor: torch.Tensor) -> Planes:
    """augment.vivi.shift_and_saturate."""
    red, green, blue = (plane + shift for plane in planes)
    return clipped(*adjust_hsv((red, green, blue), factor, torch.zeros_like(factor)))


def adjust_hsv(planes: Planes, saturation_factor: torch.Tensor, hue_shift: torch.Tensor) -> Planes:
    r, g, b = planes
    v = torch.maximum(torch.maximum(r, g), b)
    chroma = v - torch.minimum(torch.minimum(r, g), b)
    safe = torch.where(chroma > 0, chroma, 1.0)
    red = (g - b) / safe
    sector = torch.where(
        (r >= g) & (r >= b),
        torch.where(red < 0, red + 6, red),
        torch.where(g >= b, (b - r) / safe + 2, (r - g) / safe + 4),
    )
    h = torch.where(chroma > 0, sector / 6, 0.0) + hue_shift
    h = h - h.floor()
    s = torch.where(v > 0, chroma / torch.where(v > 0, v, 1.0), 0.0)
    s = (s * saturation_factor).clamp(0, 1)

    def channel(offset: int) -> torch.Tensor:
        k = offset + h * 6
        k = torch.where(k >= 6, k - 6, k)
        return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)

    return channel(5), channel(3), channel(1)


def grey(planes: Planes) -> Planes:
    of_pixels = luma(planes)
    return of_pixels, of_pixels, of_pixels


def luma(planes: Planes) -> torch.Tensor:
    return 0.2989 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]


def gaussian_blur(x_Nx3xHxW: torch.Tensor, sigma_Nx1: torch.Tensor, radius: int) -> torch.Tensor:
    """augment.color.gaussian_blur: two products with banded matrices."""

    def band(size: int) -> torch.Tensor:
        place = torch.arange(size, device=x_Nx3xHxW.device)
        distance = (place[:, None] - place[None, :])[None]
        scale = 2 * sigma_Nx1[:, :, None] ** 2
        support = torch.arange(-radius, radius + 1, device=x_Nx3xHxW.device)
        norm = torch.exp(-(support**2)[None, None] / scale).sum(dim=2, keepdim=True)
        return torch.where(distance.abs() <= radius, torch.exp(-(distance**2) / scale), 0.0) / norm

    height, width = x_Nx3xHxW.shape[2:]
    return band(height)[:, None] @ x_Nx3xHxW @ band(width)[:, None]
