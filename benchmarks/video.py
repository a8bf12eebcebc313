"""Speed of taking faces from a video: decoding against seeking, and the whole chain against the bare detector.

    python benchmarks/video.py --photo face.jpg [--frames 32] [--repeats 3] [--output video.json]

Everything runs on one CPU thread and is measured in CPU seconds, so that other work on the machine disturbs little. The
clip is made for the purpose: 300 frames of 1280×720, H.264, in which the photograph (it must show a face) moves before
a noisy background. Decoding is counted with the reading of the file and the conversion to RGB. The chain is what
preparation does with a video: decode, detect (dlib HOG, upsampled once), landmarks, crop, PNG.

With MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000 in the environment, the C library keeps the
memory of one frame for the next one instead of returning it to the system, which is worth some 4 % of the chain.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from baseline.video import seek_frames
from common import arguments, in_turn, own_cpu, save, table

from fsvfm.faces.detect import DlibHOG
from fsvfm.faces.images import load_image
from fsvfm.faces.video import frame_indices, read_frames, write_video
from fsvfm.recipes.engine import Entry
from fsvfm.recipes.photos import FaceExtractor
from fsvfm.recipes.videos import VideoFaces

WIDTH, HEIGHT, LENGTH = 1280, 720, 300


def clip(photo: np.ndarray) -> Iterator[np.ndarray]:
    """Frames of the clip."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 200, (9, 16, 3), dtype=np.uint8)
    background = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    scale = 600 / max(photo.shape[:2])
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    height, width = photo.shape[:2]
    noise = rng.integers(0, 9, (8, HEIGHT, WIDTH, 1), dtype=np.uint8)
    for number in range(LENGTH):
        x = int((WIDTH - width) / 2 * (1 + np.sin(number / 40)))
        y = int((HEIGHT - height) / 2 * (1 + np.cos(number / 25)))
        frame = background.copy()
        frame[y : y + height, x : x + width] = photo
        yield cv2.add(frame, np.repeat(noise[number % len(noise)], 3, axis=2))


def least(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least CPU seconds of each."""
    taken = in_turn({"first": first, "second": second}, repeats, own_cpu)
    return float(taken["first"].min()), float(taken["second"].min())


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = arguments(__doc__)
    parser.add_argument("--photo", type=Path, required=True, help="photograph with a face")
    parser.add_argument("--frames", type=int, default=32, help="frames taken of the clip")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement; the fastest counts")
    options = parser.parse_args()
    if options.dry:
        options.frames, options.repeats = 1, 1

    cv2.setNumThreads(1)
    indices = frame_indices(LENGTH, options.frames)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, clip(load_image(options.photo)), rate=25)
        frames = [frame for _, frame in read_frames(file, indices)]
        same = all(np.array_equal(a, b) for a, b in zip(frames, seek_frames(file, indices), strict=True))
        decode, seek = least(
            lambda: list(read_frames(file, indices)), lambda: seek_frames(file, indices), options.repeats
        )

        detector = DlibHOG()
        worker = VideoFaces(FaceExtractor(Path(folder), size=None, parser=None, max_side=None))
        entry = Entry(str(file), "clip", 0, "test", "real", "clip", frames=options.frames)
        faces = len(worker(entry).values["faces"])  # also loads the models
        detector(frames[0])
        bare, chain = least(lambda: [detector(frame) for frame in frames], lambda: worker(entry), options.repeats)

    count = len(indices)
    rows = {
        "decode in order (ours)": count / decode,
        "seek to every frame": count / seek,
        "bare detector on decoded frames": count / bare,
        "decode, detect, crop, write (ours)": count / chain,
    }
    ratios = {"decode": seek / decode, "chain": bare / chain}
    heading = f"{count} of {LENGTH} frames, {WIDTH}×{HEIGHT}, {faces} faces, one CPU thread, pixels equal: {same}"
    figures = {name: {"frames/s": value} for name, value in rows.items()}
    table(heading, {"frames/s": ",.2f"}, figures)
    print(f"decoding in order is {ratios['decode']:.1f} times as fast as seeking")
    print(f"the chain reaches {ratios['chain']:.1%} of the bare detector's rate")
    facts = {"length": LENGTH, "size": [WIDTH, HEIGHT], "faces": faces, "pixels_equal": same, "opencv": cv2.__version__}
    save(options, {**facts, "ratios": ratios, "rows": figures})


if __name__ == "__main__":
    main()
