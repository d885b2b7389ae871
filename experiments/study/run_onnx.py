"""Runs ONNX files that `branchy_jax.export.save_onnx` wrote, with onnxruntime and numpy only: this file stands alone.

    python run_onnx.py FILE --images=images.npy --expect=answers.npz [--against=PLAIN.onnx --passes=20]

`answers.npz` holds ``label`` and ``exit_index`` to compare with, and ``tie``: images whose uncertainty lies so close to
a threshold that rounding decides. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


def open_file(path: Path, **settings: object) -> ort.InferenceSession:
    """Opens a file for one core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for name, value in settings.items():
        setattr(options, name, value)
    return ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def answer(session: ort.InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    """Answers images one by one."""
    names = [output.name for output in session.get_outputs()]
    found = [session.run(names, {'image': images[n : n + 1]}) for n in range(len(images))]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*found, strict=True), strict=True)}


def exits_asked(path: Path, image: np.ndarray) -> int:
    """Returns up to which exit any node ran for one image, from the names of nodes in ONNX Runtime's profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_file(path, enable_profiling=True, profile_file_prefix=os.path.join(folder, 'profile'))
        session.run(None, {'image': image})
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = [re.match(r'(?:stage|exit|criterion)_(\d+)/', event['name']) for event in events if event['cat'] == 'Node']
    return max(int(found[1]) for found in ran if found)


def times(paths: list[Path], images: np.ndarray, passes: int) -> np.ndarray:
    """Returns milliseconds an image, ``[passes, files]``; the files take turns, in alternating order."""
    sessions, found = [open_file(path) for path in paths], np.zeros((passes, len(paths)))
    for one_pass in range(-1, passes):  # the first is not counted
        for n in range(len(paths)) if one_pass % 2 else reversed(range(len(paths))):
            start = time.perf_counter()
            for image in images:
                sessions[n].run(None, {'image': image[None]})
            found[one_pass, n] = (time.perf_counter() - start) / len(images) * 1e3
    return found


def main() -> None:
    """Answers, compares, looks into the profile, times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path)
    parser.add_argument('--images', type=Path, required=True)
    parser.add_argument('--expect', type=Path, required=True)
    parser.add_argument('--against', type=Path, help='the file of the network without exits, to time against')
    parser.add_argument('--passes', type=int, default=20)
    options = parser.parse_args()
    images, expected = np.load(options.images), np.load(options.expect)
    found = answer(open_file(options.file), images)
    same = (found['label'] == expected['label']) & (found['exit_index'] == expected['exit_index'])
    result = {
        'images': len(images),
        'differ': int((~same & ~expected['tie']).sum()),
        'differ at ties': int((~same & expected['tie']).sum()),
        'ties': int(expected['tie'].sum()),
    }
    exits = found['exit_index']
    result['shares'] = [float((exits == n).mean()) for n in range(int(exits.max()) + 1)]
    asked = {n: exits_asked(options.file, images[exits == n][:1]) for n in sorted(set(exits.tolist()))}
    result['exits_asked'] = asked
    if options.against is not None:
        if hasattr(os, 'sched_setaffinity'):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        seconds = times([options.against, options.file], images, options.passes)
        result['ms of each pass'] = seconds.tolist()
    print(json.dumps(result))
    if result['differ'] or any(count != n + 1 for n, count in asked.items()):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
