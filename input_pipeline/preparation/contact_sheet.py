"""A picture of the shots of a frame store: for every shot its first, middle and last frame, and where it lies."""

import os

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline import store
from vivi_jax.errors import DataError

MAX_VIDEOS, MAX_SHOTS = 60, 24  # as much as a person can look through
WIDTH, MARGIN, LEFT = 1680, 24, 250  # pixels; LEFT: the column of names
THUMB_HEIGHT, MAX_THUMB_WIDTH, CARD_GAP, CAPTION = 84, 200, 14, 20
BAR_HEIGHT, BAR_GAP = 8, 10
INK, MUTED, RULE = "#1b1f24", "#68707a", "#dfe3e8"
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
SHOT_COLOURS = ("#2f6f9f", "#d9822b")  # neighbouring shots differ


def write(directory: str | os.PathLike) -> str:
    """Writes DIR/contact_sheet.png of the frame store DIR; returns its path."""
    frames = store.FrameStore(directory)
    path = os.path.join(frames.directory, "contact_sheet.png")
    draw(frames).save(path)
    return path


def draw(frames: store.FrameStore) -> Image.Image:
    """The sheet: one strip per video, at most MAX_VIDEOS of them, evenly spread over the store."""
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MAX_VIDEOS)).round().astype(int))
    strips = [_strip(frames, int(video)) for video in shown]
    head = 64
    sheet = Image.new("RGB", (WIDTH, head + sum(strip.height for strip in strips) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    shots, spread = frames.meta["shots"], "" if len(shown) == len(frames) else f", {len(shown)} of them shown"
    pen.text((MARGIN, 18), f"{shots:,} shots in {len(frames):,} videos{spread}", INK, _font(20))
    pen.text((WIDTH - MARGIN, 24), "first, middle and last frame of each shot", MUTED, _font(14), anchor="ra")
    y = head
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


def _strip(frames: store.FrameStore, video: int) -> Image.Image:
    """One video: name and facts on the left; on the right a time line with the cuts, below it one card per shot."""
    shots = frames.shots(video)
    scale = min(THUMB_HEIGHT / frames.height[video], MAX_THUMB_WIDTH / frames.width[video])
    thumb = max(1, round(frames.width[video] * scale)), max(1, round(frames.height[video] * scale))
    card_width = 3 * thumb[0] + 4
    columns = max(1, (WIDTH - LEFT - MARGIN + CARD_GAP) // (card_width + CARD_GAP))
    drawn = shots[:MAX_SHOTS]
    lines = -(-len(drawn) // columns)
    card_height = thumb[1] + CAPTION + 12
    height = max(BAR_HEIGHT + BAR_GAP + lines * card_height, 4 * 19) + 34
    strip = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(strip)
    pen.line([(MARGIN, 0), (WIDTH - MARGIN, 0)], RULE)
    _draw_facts(pen, frames, video, len(shots))
    _draw_time_line(pen, shots, int(frames.num_frames[video]))
    for k, (start, stop) in enumerate(drawn.tolist()):
        x = LEFT + (k % columns) * (card_width + CARD_GAP)
        y = 16 + BAR_HEIGHT + BAR_GAP + (k // columns) * card_height
        pen.rectangle([x, y, x + card_width - 1, y + 2], SHOT_COLOURS[k % 2])
        for i, frame in enumerate((start, (start + stop - 1) // 2, stop - 1)):
            strip.paste(_thumbnail(frames, video, frame, thumb), (x + i * (thumb[0] + 2), y + 4))
        fps = frames.fps[video]
        text = f"{start / fps:.2f} - {stop / fps:.2f} s"
        pen.text((x, y + 4 + thumb[1] + 3), text, INK, _font(13))
        if card_width > 230:
            pen.text((x + card_width, y + 4 + thumb[1] + 3), f"{stop - start} frames", MUTED, _font(13), anchor="ra")
    if len(shots) > len(drawn):
        pen.text(
            (WIDTH - MARGIN, height - 22), f"and {len(shots) - len(drawn)} more shots", MUTED, _font(13), anchor="ra"
        )
    return strip


def _draw_facts(pen: ImageDraw.ImageDraw, frames: store.FrameStore, video: int, num_shots: int) -> None:
    folder, name = os.path.split(str(frames.videos[video]))
    fps, count = float(frames.fps[video]), int(frames.num_frames[video])
    facts = [
        f"{count / fps:.1f} s, {count:,} frames at {fps:.4g} Hz",
        f"{frames.width[video]} x {frames.height[video]}, {num_shots} shot{'s' * (num_shots > 1)}",
    ]
    if frames.label[video] >= 0:
        facts.append(f"label: {frames.class_names[frames.label[video]]}")
    pen.text((MARGIN, 12), _shorten(name, _font(15)), INK, _font(15))
    for i, line in enumerate(([folder + "/"] if folder else []) + facts):
        pen.text((MARGIN, 34 + 19 * i), _shorten(line, _font(13)), MUTED, _font(13))


def _draw_time_line(pen: ImageDraw.ImageDraw, shots: np.ndarray, num_frames: int) -> None:
    """A bar as long as the video, in the colours of the shots; white gaps are the cuts."""
    for k, (start, stop) in enumerate(shots.tolist()):
        left, right = (LEFT + (WIDTH - LEFT - MARGIN) * frame / num_frames for frame in (start, stop))
        pen.rectangle([left + (k > 0), 14, max(left + (k > 0), right - 2), 13 + BAR_HEIGHT], SHOT_COLOURS[k % 2])


def _thumbnail(frames: store.FrameStore, video: int, frame: int, size: tuple[int, int]) -> Image.Image:
    [jpeg] = frames.read_frames(video, np.array([frame]))
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise DataError(f"{frames.frame_name(video, frame)} is damaged and does not decode; prepare it again")
    return Image.fromarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)[..., ::-1])


def _shorten(text: str, font: _Font) -> str:
    """Text that fits the left column; a long one keeps its beginning and end."""
    text = text.encode(errors="replace").decode()
    keep = len(text)
    while font.getlength(text) > LEFT - MARGIN - 16:
        keep -= 1
        text = f"{text[: keep // 2]}...{text[-(keep // 2) :]}"
    return text


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)
