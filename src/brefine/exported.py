"""Prediction from an exported file, with onnxruntime or OpenVINO alone: nothing here needs torch.

``brefine predict model.onnx`` is this and ``jobs``. In Python:

    import brefine.exported

    model = brefine.exported.load("model.onnx")
    records = model("picture.jpg")  # COCO results

From a picture to its records it is the way of ``predict.Predictor``: the same file, the same
resizing (Pillow's, which differs from torch's by one grey value at most), the same pasting.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brefine.data.pictures import network_size
from brefine.header import limits, read_header
from brefine.runs import paste
from brefine.sources import Held, as_array
from brefine.structures import InputError
from brefine.tiling import choose_tile, lay, merge
from brefine.views import PLAIN, View

#: suffixes of the files by format
FORMATS = {"onnx": ".onnx", "openvino": ".xml"}
#: what a file gives, in this order
INPUTS = 3  # pixels, sizes, least
OUTPUTS = ("boxes", "labels", "scores", "pictures", "logits")
SPANS = "spans"  # and this, where masks reach beyond boxes
LONGEST = 10_000  # pixels that a file may ask short sides to be resized to
MULTIPLE = 32  # pixels that the sides of a batch are multiples of

Array = NDArray[Any]


def hash_of(file: Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def needs(package: str, extra: str) -> InputError:
    """What to say when a package is missing."""
    return InputError(f"{package} is not installed: pip install 'brefine[{extra}]'")


class Session:
    """An exported file, opened by its runtime.

    Args:
        path: ``.onnx``, or ``.xml`` with its ``.bin`` beside it.
        threads: that a run uses; None: ``OMP_NUM_THREADS``, or as many as the runtime likes.

    Attributes:
        metadata: what the file says of itself.
        categories: label ``i`` is row ``i``.
        thresholds: the probability from which a class is reported, for each label.
        overall: one for all labels.
        calibration: from scores to probabilities.
        short_side: pixels the picture's short side is resized to, unless
        long_side: the long side would then exceed this.
        least: score above which objects are detected.

    Raises:
        InputError: no such file, a damaged one or one of another origin, or its runtime is not
            installed.
    """

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        self.path = path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file: name one that brefine export wrote")
        threads = threads or _wanted_threads()
        metadata, self._run = (_open_ir if path.suffix == ".xml" else _open_onnx)(path, threads)
        self.metadata = dict(metadata)
        header = read_header(metadata, path)
        self.categories, self.thresholds, self.overall, self.calibration = header
        try:
            self.short_side, self.long_side, self.least = (
                json.loads(metadata[key]) for key in ("short_side", "long_side", "score_threshold")
            )
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: its metadata lacks sizes or threshold: damaged") from None
        sides = type(self.short_side) is type(self.long_side) is int
        if not (
            sides
            and 0 < self.short_side <= min(LONGEST, self.long_side)
            and type(self.least) in (int, float)
            and 0 <= self.least <= 1
        ):
            raise InputError(
                f"{path}: its metadata has sides {self.short_side} and {self.long_side} and "
                f"threshold {self.least}: damaged"
            )

    def __call__(self, pixels: Array, sizes: Array, least: float) -> tuple[Array, ...]:
        """Boxes ``[N, 4]``, labels, scores, pictures ``[N]`` and mask logits ``[N, S, S]``.

        A model with ``mask_margin`` gives the RoIs ``[N, 4]`` that the logits span, too.

        Args:
            pixels: ``[B, 3, H, W]`` uint8, zeros at the right and the bottom; H and W are
                multiples of ``MULTIPLE``.
            sizes: ``[B, 2]`` int64, (height, width) of each picture inside.
            least: score above which an object is detected.
        """
        found: tuple[Array, ...] = self._run(pixels, sizes, np.array([least], dtype=np.float32))
        return found

    def digest(self) -> bytes:
        """A hash of the file, and of the one beside it."""
        content = hashlib.sha256(self.path.read_bytes())
        if self.path.suffix == ".xml":
            content.update(self.path.with_suffix(".bin").read_bytes())
        return content.digest()

    def refuse(self, what: str) -> InputError:
        """What to say of something that an exported model cannot do."""
        return InputError(f"{self.path}: an exported model cannot be {what}: use the model folder")


class Model:
    """An exported model: pictures in, COCO results out.

    Args:
        session: the file.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.categories = session, session.categories
        self.thresholds, self.overall = session.thresholds, session.overall
        self.calibration = session.calibration

    def __call__(
        self,
        picture: Held,
        image_id: int | str | None = None,
        *,
        threshold: float | None = None,
        tile: int | Literal["auto"] | None = None,
        overlap: int | None = None,
    ) -> list[dict[str, Any]]:
        """The objects of a picture as COCO results, best score first.

        Args:
            picture: a file, its content, a PIL picture or an array; see ``sources.as_array``.
            image_id: for the records; None: the file's name, or ``picture``.
            threshold: objects with a lower score are dropped; None: the model's own by class.
            tile: side of tiles, in pixels; see ``predict.Predictor.records``.
            overlap: see there, too.

        Returns:
            For each object ``image_id``, ``category_id``, ``score``, ``bbox`` (x, y, width,
            height) and ``segmentation`` (RLE).

        Raises:
            InputError: no picture, an array of another shape or type, or an overlap that does not
                fit the tiles.
        """
        if image_id is None:
            image_id = Path(picture).name if isinstance(picture, str | Path) else "picture"
        return self.records(picture, image_id, threshold=threshold, tile=tile, overlap=overlap)

    def records(
        self,
        picture: Held,
        image_id: int | str,
        *,
        threshold: float | None = None,
        views: Sequence[View] = PLAIN,
        tile: int | Literal["auto"] | None = None,
        overlap: int | None = None,
    ) -> list[dict[str, Any]]:
        """The call, for an id; ``views`` must be the plain one."""
        session, pixels = self.session, as_array(picture)
        if tuple(views) != PLAIN:
            raise session.refuse("asked about given boxes, as --tta does")
        size = (pixels.shape[0], pixels.shape[1])
        if tile == "auto":
            tile = choose_tile(size, session.short_side, session.long_side)
        grid = lay(size, tile, overlap)
        found = [
            self.records_of([pixels[y1:y2, x1:x2]], [image_id], threshold=threshold)[0]
            for x1, y1, x2, y2 in grid.tiles
        ]
        return merge(found, grid)

    def records_of(
        self,
        pictures: Sequence[Held],
        ids: Sequence[int | str],
        *,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """COCO results of each of several pictures, with the ids given.

        Those that have one size for the network go through it together.
        """
        held = [as_array(picture) for picture in pictures]
        sizes = [(pixels.shape[0], pixels.shape[1]) for pixels in held]
        batches = [prepare(pixels, self.session) for pixels in held]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, shape) in enumerate(batches):
            groups.setdefault(tuple(shape[0].tolist()), []).append(i)
        records: dict[int, list[dict[str, Any]]] = {}
        for small, members in groups.items():
            pixels, frames = (np.concatenate([batches[i][k] for i in members]) for k in (0, 1))
            found = self.session(pixels, frames, self.session.least)
            for k, i in enumerate(members):
                of = found[3] == k
                above = self._above([part[of] for part in found], threshold)
                records[i] = self._records(above, ids[i], sizes[i], small)
        return [records[i] for i in range(len(held))]

    def describe(self) -> dict[str, Any]:
        """Everything that a prediction follows from, the file as a hash."""
        return {"weights": self.session.digest().hex()}

    def _above(self, found: Sequence[Array], threshold: float | None) -> list[Array]:
        """What the session gives of objects whose score, now calibrated, is high enough."""
        boxes, labels, scores, *others = found
        chosen = limits(self.thresholds, threshold)
        scores = self.calibration(scores)
        # In single precision: a score of 0.7 that the model computed in it is not below 0.7.
        some = scores.astype(np.float32) >= np.array(chosen, dtype=np.float32)[labels]
        return [part[some] for part in (boxes, labels, scores, *others)]

    def _records(
        self,
        found: Sequence[Array],
        image_id: int | str,
        size: tuple[int, int],
        small: tuple[int, ...],
    ) -> list[dict[str, Any]]:
        """COCO results in a picture of ``size`` that the network saw at the size ``small``."""
        boxes, labels, scores, _, logits, *spans = found
        scale = np.array([size[1] / small[1], size[0] / small[0]] * 2, dtype=np.float32)
        limit = np.array([size[1], size[0]] * 2, dtype=np.float32)
        boxes = np.clip(boxes * scale, 0, limit).astype(np.float64)
        rois = (spans[0] * scale).astype(np.float64) if spans else boxes
        return [
            {
                "image_id": image_id,
                "category_id": self.categories[label].id,
                "score": score,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": mask.encode(),
            }
            for (x1, y1, x2, y2), label, score, mask in zip(
                boxes.tolist(),
                labels,
                scores.tolist(),
                paste(logits, boxes, size, rois),
                strict=True,
            )
        ]


def is_exported(path: Path | str) -> bool:
    """Whether a path names an exported file, by its suffix."""
    return Path(path).suffix in FORMATS.values() and not Path(path).is_dir()


def load(path: Path | str, threads: int | None = None) -> Model:
    """Open an exported file.

    Raises:
        InputError: see ``Session``.
    """
    return Model(Session(path, threads))


def prepare(pixels: NDArray[np.uint8], session: Session) -> tuple[Array, Array]:
    """A picture ``[H, W, 3]`` as a batch of one, resized and filled up, and its size there."""
    size = pixels.shape[0], pixels.shape[1]
    height, width = network_size(size, session.short_side, session.long_side)
    if (height, width) != size:
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    sides = [-(-side // MULTIPLE) * MULTIPLE for side in (height, width)]
    batch = np.zeros((1, 3, *sides), dtype=np.uint8)
    batch[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return batch, np.array([[height, width]], dtype=np.int64)


def _wanted_threads() -> int | None:
    """What torch goes by, too."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else None


def _open_onnx(path: Path, threads: int | None) -> tuple[Mapping[str, str], Any]:
    try:
        import onnxruntime
    except ImportError:
        raise needs("onnxruntime", "onnx") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, and RuntimeError
        raise _damaged(path, "ONNX", error) from None

    names = [each.name for each in session.get_inputs()]
    given = _check_graph(path, len(names), [each.name for each in session.get_outputs()])

    def run(*inputs: Array) -> tuple[Array, ...]:
        return tuple(session.run(given, dict(zip(names, inputs, strict=True))))

    return session.get_modelmeta().custom_metadata_map, run


def openvino_core() -> Any:
    """The one Core of this process.

    Raises:
        InputError: OpenVINO is not installed.
    """
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise needs("openvino", "openvino") from None
    return _core()


def _check_graph(path: Path, inputs: int, outputs: Collection[str]) -> list[str]:
    """Make sure that a graph is that of a model, whatever its metadata says.

    Returns:
        The outputs to ask for, in the order that ``Session`` gives them.

    Raises:
        InputError: it is not.
    """
    if inputs != INPUTS or not {*OUTPUTS} <= {*outputs}:
        raise InputError(
            f"{path}: its graph has {inputs} inputs and the outputs {', '.join(outputs)}, not "
            f"{INPUTS} and {', '.join(OUTPUTS)}: name a file that brefine export wrote"
        )
    return [*OUTPUTS, *({SPANS} & {*outputs})]


@cache
def _core() -> Any:
    """Stays as long as the process.

    A Core gives the thread that makes it another stack for signals. It unmaps that when it goes
    and does not always give the old one back (not in another thread, nor if another Core is
    newer): the next signal, of a child that ends or of Ctrl-C, would end the process without a
    word.
    """
    import openvino

    return openvino.Core()


def _open_ir(path: Path, threads: int | None) -> tuple[Mapping[str, str], Any]:
    core = openvino_core()
    # Some processors would else compute in half precision.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.read_model(path)
        metadata = {}
        if model.has_rt_info("brefine"):
            info = model.get_rt_info("brefine")
            metadata = {key: str(value) for key, value in info.value.items()}
        compiled = core.compile_model(model, "CPU", options)
        outputs = [name for each in model.outputs for name in each.names]
    except Exception as error:  # RuntimeError, mostly
        raise _damaged(path, "OpenVINO", error) from None
    weights = path.with_suffix(".bin")
    if metadata.get("weights", own := hash_of(weights)) != own:
        raise InputError(f"{weights}: not the one that {path.name} was written with: copy both")
    given = _check_graph(path, len(model.inputs), outputs)

    def run(*inputs: Array) -> tuple[Array, ...]:
        found = compiled(list(inputs))
        return tuple(found[name] for name in given)

    return metadata, run


def _damaged(path: Path, format: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{path}: damaged, or no {format} file ({reason})")
