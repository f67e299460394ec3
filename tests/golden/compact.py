"""Write the compact golden set of this folder from the full one: python -m tests.golden.compact FOLDER.

What is kept and why it suffices: README.md beside this file. No number is rounded: arrays are copied, or left out.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

# Small intermediates between the parts of the network; those inside the blocks are in the full set.
BETWEEN_PARTS = {
    *("pos_emb", "pos_emb_args", "t_embedder", "fps_embedder", "t_block", "y_embedder", "camera_token"),
    *("frame_token", "cond_sequence", "before_proj"),
}
MORE = {"stage3_f1": {"bbox_embedder", "base_blocks_s.0", "control_blocks_t.0.1"}}  # the smallest case
ENCODED, DECODED = (1, 17), (8, 25)  # frames of the VAE's cases
TILE_STEP = 4

Arrays = dict[str, np.ndarray]


def model_case(case: str) -> Callable[[Arrays], Arrays]:
    """Keep a case's inputs, output and some intermediates."""
    kept = BETWEEN_PARTS | MORE.get(case, set())
    return lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("mid/") or n[4:] in kept}


def sample(arrays: Arrays) -> Arrays:
    """Keep the start and the results. The conditions are those of the case stage3_f17 with nothing dropped."""
    return {name: array for name, array in arrays.items() if name == "in/z" or name.endswith(("z_final", "json__"))}


def scheduler(arrays: Arrays) -> Arrays:
    """Leave out the stand-in network's outputs, which follow from its inputs, and most inputs."""
    traced = ("sample/rflow/x", "sample/rflow_mask/x", "sample/rflow_mask/noise_drawn", "sample/in/z")
    return {
        name: array
        for name, array in arrays.items()
        if name in traced or not (name.startswith("sample/in/") or name.endswith(("/v", "/x", "/noise_drawn")))
    }


def vae(arrays: Arrays) -> Arrays:
    """Keep one clip of some lengths, and every fourth row and column of the large picture."""
    kept = {name: array for name, array in arrays.items() if not name.startswith(("enc", "tile/"))}
    for name, array in arrays.items():
        frames, _, kind = name.removeprefix("enc").partition("/")
        if not frames.isdigit():
            continue
        wanted = ENCODED if kind != "decoded_from_micro8" else DECODED
        if int(frames) in wanted or (kind == "mean_scaled_micro8" and int(frames) in DECODED):
            kept[name] = array[:1]
    kept["tile/z"] = arrays["tile/z"]
    kept["tile/decoded_untiled"] = arrays["tile/decoded_untiled"][..., ::TILE_STEP, ::TILE_STEP]
    return kept


def everything(arrays: Arrays) -> Arrays:
    """Keep all."""
    return arrays


FILES: Mapping[str, Callable[[Arrays], Arrays]] = {
    **{f"model_{case}": model_case(case) for case in ("stage1_keep", "stage3_f1", "stage3_f17")},
    **{f"model_{case}": model_case(case) for case in ("stage3_f17_xmask_drop", "stage3_pad4")},
    **{f"model_{stage}_weights": everything for stage in ("stage1", "stage3")},
    **dict.fromkeys(("collate_null", "condition", "train_step"), everything),
    "sample_tiny": sample,
    "scheduler": scheduler,
    "vae": vae,
}


class _FloatCompressor(zipfile.LZMACompressor):  # type: ignore[name-defined,misc]  # not in the stubs
    """LZMA that learns each of a number's four bytes by itself: a tenth smaller on float32 than with its defaults."""

    def _init(self) -> bytes:
        chosen = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}
        packed = lzma._encode_filter_properties(chosen)  # type: ignore[attr-defined]
        self._comp = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[chosen])
        return struct.pack("<BBH", 9, 4, len(packed)) + packed


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write an archive that ``numpy.load`` reads; the same arrays give the same bytes."""
    usual = zipfile.LZMACompressor  # type: ignore[attr-defined]
    zipfile.LZMACompressor = _FloatCompressor  # type: ignore[attr-defined]
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            for name, array in arrays.items():
                data = io.BytesIO()
                np.lib.format.write_array(data, np.ascontiguousarray(array))
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue(), zipfile.ZIP_LZMA)
    finally:
        zipfile.LZMACompressor = usual  # type: ignore[attr-defined]


def pack(arrays: Arrays) -> Arrays:
    """Join many small arrays to one for each type; the layout is an entry of its own. Inverse: ``read_arrays``."""
    joined: dict[str, list[np.ndarray]] = {}
    for array in arrays.values():
        joined.setdefault(str(array.dtype), []).append(array.ravel())
    layout = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    packed = {dtype: np.concatenate(parts) for dtype, parts in joined.items()}
    return {"__layout__": np.frombuffer(json.dumps(layout).encode(), np.uint8), **packed}


def compact(source: Path, target: Path) -> None:
    """Write the compact set of ``source`` into ``target``."""
    for name, choose in FILES.items():
        with np.load(source / f"golden_{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        chosen = choose(arrays)
        if name == "vae":
            meta = json.loads(bytes(arrays["__meta_json__"])) | {"tile_step": TILE_STEP}
            chosen["__meta_json__"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        write_npz(target / f"golden_{name}.npz", chosen if name.startswith("model_") else pack(chosen))
    shutil.copyfile(source / "golden_sampler.json", target / "golden_sampler.json")
    card = json.dumps(json.loads((source / "model_card.json").read_text()))
    (target / "model_card.json.gz").write_bytes(gzip.compress(card.encode(), 9, mtime=0))


if __name__ == "__main__":
    compact(Path(sys.argv[1]), HERE)
