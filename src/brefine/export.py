"""A model as one file for other runtimes: ONNX, or OpenVINO's IR.

The file holds the network from pixels to boxes and mask logits, and in its metadata what
``exported`` needs to do the rest: sizes, classes, thresholds and calibration. It is kept only if
it finds what the model finds (`check`).
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import nms

import brefine
from brefine import weights
from brefine.exported import FORMATS, OUTPUTS, SPANS, Session, hash_of, needs
from brefine.files import replacing
from brefine.header import describe_classes, describe_scores
from brefine.parts import boxes as B
from brefine.parts.inference import fold
from brefine.parts.masks import bound, paste
from brefine.parts.two_stage import TwoStage
from brefine.progress import track
from brefine.rle import Runs
from brefine.runs import intersect
from brefine.structures import Images, InputError, Instances

OPSET = 18  # NonMaxSuppression and RoiAlign with half pixels are standard in it
#: pixels that boxes, and IoU that masks must agree within for a file to be kept
BOX_LIMIT, MASK_LIMIT = 0.01, 0.999
SCORE_LIMIT = 1e-3  # and scores; rounding makes it some 1e-5
#: by which rounding may change a mask's logits, as a share of the largest: other orders of a sum
#: change features by a tenth of it
SLACK = 1e-4
#: objects whose score is this close to where a full list ends may be on it or not
TIE = 1e-4
#: objects that the two are asked for at once: their masks may need gigabytes
MOST = 100
#: share of a batch's objects that only one of the two may find: lists of candidates end inside
#: the model, too, and in the last digit one box or another is on them. That makes two objects, one
#: on either side, and a batch has about a hundred
ALONE = 0.025


class Graph(nn.Module):
    """What is exported: a two-stage model that finds the objects of a whole batch at once.

    The same as ``TwoStage.predict``, for any number of pictures without a loop over them.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: TwoStage) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, sizes: Tensor, least: Tensor) -> tuple[Tensor, ...]:
        """Boxes ``[N, 4]``, labels, scores, pictures ``[N]`` and mask logits ``[N, S, S]``.

        With the detector's ``mask_margin`` also the RoIs ``[N, 4]`` that the logits span.

        Args:
            pixels: ``[B, 3, H, W]`` uint8, H and W multiples of 32; see ``Images``.
            sizes: ``[B, 2]`` int64.
            least: ``[1]``, score above which an object is detected.
        """
        model = self.model
        features = model.features(Images(pixels, sizes))
        limit = sizes.flip(1).repeat(1, 2).float()[:, None]  # [B, 1, 4]
        proposals = self._propose(features, limit)
        boxes, labels, scores, there = self._detect(features, proposals, limit, least)
        image, row = there.nonzero().unbind(1)
        boxes, labels, scores = boxes[image, row], labels[image, row], scores[image, row]
        own = model.detector.mask_margin
        spans = B.enlarge(boxes, own)
        rows = torch.cat([image[:, None].float(), spans], 1)
        logits = model.mask_head(features, rows, labels)
        if own:
            boxes = bound(boxes, logits, spans, sizes[image])
        quality = model.quality(features, rows, labels, logits)
        found = [boxes, labels, scores, image, logits, *([spans] if own else [])]
        if quality is not None:
            found[2] = (scores * quality).clamp(0, 1)
            # picture by picture, best first
            order = (found[2] - 2 * image).topk(scores.shape[0]).indices
            found = [part[order] for part in found]
        return tuple(found)

    def _propose(self, features: Sequence[Tensor], limit: Tensor) -> Tensor:
        """Proposals ``[B, P, 4]``, best first; missing ones are zero boxes."""
        net = self.model.rpn
        most = net.candidates[1]
        boxes, scores = [], []
        for anchor, logit, delta in zip(*net(features[: len(net.strides)]), strict=True):
            # Coarse levels may have less anchors than candidates: filled up, k is a constant.
            filling = logit.new_full((1, most), -torch.inf).expand(logit.shape[0], -1)
            score, index = torch.cat([logit, filling], 1).topk(most, 1)
            index = index.clamp(max=anchor.shape[0] - 1)
            chosen = delta.gather(1, index[..., None].expand(-1, -1, 4))
            box = B.decode(chosen, anchor[index], net.delta_weights)
            box = torch.minimum(box.clamp(min=0), limit)
            good = (score > -torch.inf) & (box[..., 2:] - box[..., :2] >= 1e-3).all(-1)
            boxes.append(box)
            scores.append(torch.where(good, score.sigmoid(), -1.0))
        box, score = torch.cat(boxes, 1), torch.cat(scores, 1)
        levels = torch.arange(len(boxes))
        own = levels.repeat_interleave(most) == levels[:, None]
        by_level = torch.where(own, score[:, None], -1.0)  # [B, L, A]
        kept = keep(box, by_level, 0.7, torch.full((1,), -0.5)).amax(1) > 0
        score, index = torch.where(kept, score, -1.0).topk(net.proposals[1], 1)
        found = box.gather(1, index[..., None].expand(-1, -1, 4))
        return torch.where(score[..., None] >= 0, found, 0.0)

    def _detect(
        self, features: Sequence[Tensor], proposals: Tensor, limit: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes ``[B, D, 4]``, labels, scores and which of them are there, best first."""
        head = self.model.box_head
        count, classes = proposals.shape[1], head.num_classes
        image = torch.arange(proposals.shape[0])[:, None, None].expand(-1, count, -1).float()
        rows = torch.cat([image, proposals], 2).flatten(0, 1)
        scores, boxes = head.score(features, rows, limit.expand(-1, count, -1).flatten(0, 1))
        boxes = boxes.reshape(-1, count, classes, 4)
        scores = scores.reshape(-1, count, classes)  # [B, P, K]
        there = (proposals[..., 2:] > proposals[..., :2]).all(-1)[..., None]
        good = (scores > least) & (boxes[..., 2:] - boxes[..., :2] >= 1e-2).all(-1) & there
        scores = torch.where(good, scores, -1.0)
        # Boxes belong to a class: to NMS, every class is a picture with one class.
        of_class = scores.transpose(1, 2).flatten(0, 1)[:, None]
        kept = keep(boxes.transpose(1, 2).flatten(0, 1), of_class, head.nms, least)
        kept = kept.reshape(-1, classes, count).transpose(1, 2) > 0
        scores = torch.where(kept, scores, -1.0).flatten(1)
        score, index = scores.topk(min(head.detections, count * classes), 1)
        box = boxes.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, 4))
        return box, index % classes, score, score >= 0


def keep(boxes: Tensor, scores: Tensor, threshold: float, least: Tensor) -> Tensor:
    """Non-maximum suppression of a batch, class by class: ``[B, C, N]``, 1 what stays, else 0.

    Args:
        boxes: ``[B, N, 4]``.
        scores: ``[B, C, N]``.
        threshold: IoU above which the lower score goes.
        least: ``[1]``; scores at or below it take no part.
    """
    picture, group, box = suppress(boxes, scores, threshold, least).unbind(1)
    mask = torch.zeros_like(scores)
    return mask.index_put((picture, group, box), mask.new_ones(()))


@torch.library.custom_op("brefine::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, threshold: float, least: Tensor) -> Tensor:
    """ONNX's NonMaxSuppression: ``[n, 3]`` int64 of (picture, class, box); see ``keep``."""
    found = [boxes.new_zeros((0, 3), dtype=torch.int64)]
    for i, box in enumerate(boxes):
        for j, score in enumerate(scores[i]):
            some = (score > least).nonzero()[:, 0]
            kept = some[nms(box[some], score[some], threshold)]
            found.append(torch.stack([torch.full_like(kept, i), torch.full_like(kept, j), kept], 1))
    return torch.cat(found)


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float, least: Tensor) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)


def _suppress_onnx(boxes: Any, scores: Any, threshold: float, least: Any) -> Any:
    """``suppress`` in ONNX."""
    from onnxscript import opset18

    op: Any = opset18
    most = op.Constant(value_ints=[2**31 - 1])
    return op.NonMaxSuppression(boxes, scores, most, op.Constant(value_floats=[threshold]), least)


@dataclass
class Parity:
    """How far an exported file was from its model, at worst.

    Attributes:
        objects: how many were compared.
        box: pixels.
        iou: of the masks, pasted.
        score: difference.
        unmatched: objects that only one of the two found, and not at the end of a full list.
        share: of a batch's objects, that they were.
    """

    objects: int = 0
    box: float = 0.0
    iou: float = 1.0
    score: float = 0.0
    unmatched: int = 0
    share: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the file may be kept."""
        same = self.share <= ALONE and self.score <= SCORE_LIMIT
        return self.objects > 0 and same and self.box <= BOX_LIMIT and self.iou > MASK_LIMIT

    def __str__(self) -> str:
        apart = f", {self.unmatched} found by one of them only" if self.unmatched else ""
        return (
            f"{self.objects} objects compared: boxes at most {self.box:.5f} px apart, mask IoU "
            f"{self.iou:.5f} at worst, scores within {self.score:.1e}{apart}"
        )


def export(folder: Path | str, out: Path | str, format: str = "onnx") -> Parity:
    """Write a model folder as one file, if what the file finds is what the model finds.

    Args:
        folder: the model.
        out: the file, ``.onnx``; or ``.xml``, beside which OpenVINO wants a ``.bin``.
        format: ``onnx`` or ``openvino``.

    Returns:
        How far they are apart.

    Raises:
        InputError: no model or none of those that can be exported, another suffix, a package is
            missing, the file would find something else, or it cannot be written.
    """
    out = Path(out)
    check_name(out, format)
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        if find_spec(package) is None and (package != "openvino" or format == package):
            raise needs(package, "onnx,openvino" if format == "openvino" else "onnx")
    model = weights.load(folder)
    if not isinstance(model.segmenter, TwoStage):
        method = model.recipe.model.method
        raise InputError(
            f"{folder}: {method} cannot be exported, because what is written follows the flow of "
            "two stages: predict from the model folder"
        )
    data = model.recipe.data
    metadata = {
        "format": "brefine",
        "version": brefine.__version__,
        "method": model.recipe.model.method,
        "short_side": json.dumps(data.short_side[-1]),
        "long_side": json.dumps(data.long_side),
        "score_threshold": json.dumps(model.segmenter.box_head.score_threshold),
        **describe_classes(model.categories),
        **describe_scores(model.thresholds, model.overall, model.calibration),
    }
    with beside(out) as place:
        files = _write(model.segmenter, metadata, place, format)
        session = Session(files[0], threads=torch.get_num_threads())
        parity = check(model.segmenter, session, data.short_side[-1])
        if not parity.good:
            raise InputError(f"{out}: not written: it does not find what {folder} finds ({parity})")
        del session
        move(files, out)
    return parity


def check_name(out: Path, format: str) -> None:
    """Refuse a name that does not say the format.

    Raises:
        InputError: that, or an unknown format.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    suffix = FORMATS[format]
    if out.suffix != suffix:
        raise InputError(f"{out}: a file of format {format} is named {suffix}: --out NAME{suffix}")


def move(files: Sequence[Path], out: Path) -> None:
    """Move files to where ``out`` is, each with its own suffix; the one to open comes last."""
    for file in reversed(files):
        with replacing(out.with_suffix(file.suffix)) as aside:
            file.replace(aside)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder beside a file that will be written, for as long as the block lasts.

    Raises:
        InputError: it, or the ``.bin`` beside it, cannot be written, or is of something else.
    """
    last = out.with_suffix(".bin") if out.suffix == FORMATS["openvino"] else out
    if last.is_file() and not out.exists():
        raise InputError(f"{last}: is there already, without {out.name}: choose another --out")
    if out.is_file():
        try:
            Session(out, 1)
        except InputError:
            text = f"{out}: is there already, and not from brefine export: choose another --out"
            raise InputError(text) from None
    try:
        if out.is_dir() or last.is_dir():
            raise IsADirectoryError(None, "a folder is in the way")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise InputError(f"{out}: cannot write: {error.strerror or error}") from None
    with folder as place:
        yield Path(place)


def _write(model: TwoStage, metadata: dict[str, str], place: Path, format: str) -> list[Path]:
    """The files of a model, the one to open first."""
    program = to_onnx(model)
    program.model.metadata_props.update(metadata)
    file = place / "model.onnx"
    program.save(file, external_data=False)
    if format == "onnx":
        return [file]
    import openvino

    return save_ir(openvino.convert_model(file), place / "model.xml", metadata)


def save_ir(model: Any, file: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Write OpenVINO's two files, of which the ``.xml`` names the hash of the ``.bin``.

    Returns:
        Both, the one to open first.
    """
    import openvino

    weights = file.with_suffix(".bin")
    for key, value in metadata.items():
        model.set_rt_info(value, ["brefine", key])
    openvino.save_model(model, file, compress_to_fp16=False)
    model.set_rt_info(hash_of(weights), ["brefine", "weights"])
    openvino.save_model(model, file, compress_to_fp16=False)
    return [file, weights]


def to_onnx(model: TwoStage) -> Any:
    """The graph of a model as a program of ``torch.onnx``, of any batch, height and width."""
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    shapes = ({0: batch, 2: 32 * rows, 3: 32 * columns}, {0: batch}, None)
    pixels = torch.zeros(2, 3, 96, 160, dtype=torch.uint8)
    example = pixels, torch.tensor([[90, 160], [96, 131]]), torch.zeros(1)
    with torch.no_grad(), quiet():
        graph = Graph(simplify(model)).eval()
        captured = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels", "sizes", "least"],
            output_names=[*OUTPUTS, *([SPANS] if model.detector.mask_margin else [])],
            custom_translation_table={
                cast(Any, torch.ops).brefine.suppress.default: _suppress_onnx
            },
            verbose=False,
            optimize=True,
        )
    assert program is not None
    return program


def simplify(model: TwoStage) -> TwoStage:
    """A copy with fewer operations in its trunk, without gradients, which would be traced, too.

    Norms are folded. A convolution that pads by the size of what it is given (TensorFlow's
    "same") pads by a constant, since the sides of all that it is given are multiples of its
    stride.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    model.trunk.body = fold(model.trunk.body)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv2dSame):
                setattr(module, name, _pad_plainly(child))
            elif isinstance(child, nn.GroupNorm) and child.affine:
                setattr(module, name, PlainGroupNorm(child))
    return model


class PlainGroupNorm(nn.Module):
    """Group norm that keeps the shape of its input, and so the order in which it is stored.

    Runtimes take the usual one apart by reshaping the whole map, which costs a copy each way and
    makes what follows read channels that are far apart. Weight and bias are a convolution here,
    for the same reason: OpenVINO makes one operation of products and sums that follow each other,
    and stores its result as most of the inputs are, which are numbers for each channel.

    Args:
        norm: what it stands for.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, count = norm.num_groups, norm.eps, norm.num_channels
        self.affine = nn.Conv2d(count, count, 1, groups=count, device="meta")
        self.affine.weight = nn.Parameter(norm.weight.detach()[:, None, None, None], False)
        self.affine.bias = nn.Parameter(norm.bias.detach(), False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` in and out."""
        x = x - self._mean(x)
        normed: Tensor = self.affine(x * torch.rsqrt(self._mean(x * x) + self.eps))
        return normed

    def _mean(self, x: Tensor) -> Tensor:
        """``[B, C, 1, 1]``, of each channel's group."""
        each = x.mean((2, 3)).reshape(x.shape[0], self.groups, -1)
        return each.mean(2, keepdim=True).expand_as(each).flatten(1)[:, :, None, None]


def _pad_plainly(conv: Any) -> nn.Module:
    """A convolution with padding "same" for sides that are multiples of its stride."""
    sides = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
    vertical, horizontal = (max(0, (size - 1) * gap + 1 - step) for size, gap, step in sides)
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    left, top = horizontal // 2, vertical // 2
    return nn.Sequential(nn.ZeroPad2d((left, horizontal - left, top, vertical - top)), plain)


@contextmanager
def quiet() -> Iterator[None]:
    """Without remarks, such as the exporter's about names of axes and empty attributes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.inference_mode()
def check(model: TwoStage, session: Session, short_side: int) -> Parity:
    """Compare a file with its model, on drawn pictures.

    Three sizes, batches of one and of three, and each with no object, one and as many as the
    model finds at a threshold of 0, at most the best hundred and their equals. So it matters for
    nothing how well the model was trained.

    Args:
        model: in evaluation mode, on the CPU.
        session: the file.
        short_side: of the network's pictures; small ones are taken in place of large.
    """
    side = max(64, min(short_side, 256))
    sizes = [(side, side), (side, side * 3 // 2), (side * 5 // 4 + 7, side - 3)]
    cases = [(size, batch) for size in sizes for batch in (1, 3)]
    parity, head = Parity(), model.box_head
    usual = head.score_threshold
    try:
        for seed, (size, batch) in enumerate(track(cases, "check", len(cases))):
            generator = torch.Generator().manual_seed(seed)
            images = Images.stack([_draw(size, generator) for _ in range(batch)])
            head.score_threshold = 0.0
            found = model.predict(images)
            scores = torch.cat([cast(Tensor, each.scores) for each in found]).sort().values
            for count in (MOST, 1):
                if count < len(scores):
                    # between two that no rounding takes for equal: some models are sure of many
                    below = scores[scores < scores[-count] - TIE]
                    least = float(below[-1] + scores[-count]) / 2 if len(below) else 0.0
                    head.score_threshold = least
                    found = model.predict(images)
                _compare(
                    found, _run(session, images, head.score_threshold), parity, head.detections
                )
            head.score_threshold = 1.0
            found = model.predict(images)
            _compare(found, _run(session, images, 1.0), parity, head.detections)
    finally:
        head.score_threshold = usual
    return parity


def _draw(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Coloured clouds and discs, ``[3, H, W]`` uint8."""
    height, width = size
    clouds = torch.rand(1, 3, 5, 5, generator=generator)
    picture = functional.interpolate(clouds, size=size, mode="bicubic")[0].clamp(0, 1)
    ys, xs = torch.arange(height)[:, None], torch.arange(width)
    for x, y, radius in torch.rand(8, 3, generator=generator).tolist():
        radius = (0.04 + 0.2 * radius) * min(size)
        inside = (xs - x * width) ** 2 + (ys - y * height) ** 2 < radius**2
        picture[:, inside] = torch.rand(3, 1, generator=generator)
    grain = torch.rand(picture.shape, generator=generator) * 0.1
    return ((picture * 0.9 + grain) * 255).to(torch.uint8)


def _run(session: Session, images: Images, least: float) -> list[Instances]:
    """What a file finds in each picture of a batch."""
    found = session(images.pixels.numpy(), images.sizes.numpy(), least)
    boxes, labels, scores, pictures, logits, *spans = map(torch.from_numpy, found)
    every = [
        Instances(
            (height, width), boxes, labels, scores, logits=logits, spans=spans[0] if spans else None
        )
        for height, width in images.sizes.tolist()
    ]
    return [one[pictures == i] for i, one in enumerate(every)]


def _compare(
    expected: Sequence[Instances], found: Sequence[Instances], parity: Parity, most: int
) -> None:
    """Match the objects of each picture of a batch by class and RoI, in whatever order they are.

    ``most`` objects are a full list.
    """
    unmatched = 0
    for one, other in zip(expected, found, strict=True):
        pairs, alone = _match(one, other)
        lists = (cast(Tensor, one.scores), cast(Tensor, other.scores))
        # Where a full list ends, an equal score decides which of two objects is still on it.
        ends = [float(scores.min()) if len(scores) == most else -1.0 for scores in lists]
        unmatched += sum(float(lists[side][i]) > ends[1 - side] + TIE for side, i in alone)
        parity.objects += len(pairs)
        if not pairs:
            continue
        mine, theirs = torch.tensor(pairs).unbind(1)
        rois = _rois(one)[mine]
        parity.box = max(parity.box, float((rois - _rois(other)[theirs]).abs().max()))
        if other.spans is not None:
            # The box around a mask jumps if a cell changes sides: it must suit its own mask.
            size = torch.tensor(other.size)
            drawn = bound(other.boxes, cast(Tensor, other.logits), other.spans, size)
            parity.box = max(parity.box, float((drawn - other.boxes).abs().max()))
        apart = (lists[0][mine] - lists[1][theirs]).abs().max()
        parity.score = max(parity.score, float(apart))
        logits, others = cast(Tensor, one.logits)[mine], cast(Tensor, other.logits)[theirs]
        # Masks that are empty or full would be equal whatever the logits: cut those at the mean.
        low, high = logits.amin((1, 2)), logits.amax((1, 2))
        level = torch.where((low < 0) & (high > 0), 0.0, logits.mean((1, 2)))[:, None, None]
        slack = SLACK * logits.abs().amax((1, 2), keepdim=True)
        # In the same RoIs: where one ends at the middle of a pixel, so does a row of the mask.
        each = (logits - level - slack, logits - level + slack, others - level)
        masks = [paste(values, rois, one.size) for values in each]
        parity.iou = min(parity.iou, *map(_alike, *masks))
    parity.unmatched += unmatched
    objects = sum(max(len(one), len(other)) for one, other in zip(expected, found, strict=True))
    parity.share = max(parity.share, unmatched / max(1, objects))


def _alike(sure: Runs, perhaps: Runs, found: Runs) -> float:
    """IoU of a mask and another, whose pixels are ``sure``, or only ``perhaps`` in it.

    What is perhaps in it is as the mask has it: the last digits of a logit decide on it.
    """
    missing = sure.area() - intersect(sure, found).area()
    beyond = found.area() - intersect(found, perhaps).area()
    whole = found.area() + missing
    return 1 - (missing + beyond) / whole if whole else 1.0


def _match(one: Instances, other: Instances) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of objects, nearest first, and what is left as (0 or 1 for whose, index)."""
    apart = (_rois(one)[:, None] - _rois(other)).abs().amax(2)
    apart[one.labels[:, None] != other.labels] = torch.inf
    free = [set(range(len(one))), set(range(len(other)))]
    pairs = []
    for place in apart.flatten().argsort().tolist():
        i, j = divmod(place, len(other))
        if apart[i, j] > 1:
            break
        if i in free[0] and j in free[1]:
            free[0].remove(i)
            free[1].remove(j)
            pairs.append((i, j))
    return pairs, [(side, i) for side in (0, 1) for i in sorted(free[side])]


def _rois(found: Instances) -> Tensor:
    """What the logits span, ``[N, 4]``: the boxes, or more."""
    return found.boxes if found.spans is None else found.spans


class Exported(nn.Module):
    """An exported file as a model that `Predictor` takes; it can only detect.

    Args:
        session: the file.
        num_classes: K.
    """

    digest: Tensor

    def __init__(self, session: Session, num_classes: int) -> None:
        super().__init__()
        self.session, self.num_classes = session, num_classes
        # In the state dict, by which runs of `predict` are told apart.
        self.register_buffer("digest", torch.tensor(list(session.digest()), dtype=torch.uint8))

    def loss(self, images: Images, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """An exported model has none."""
        raise self.session.refuse("trained")

    def features(self, images: Images) -> Images:
        """The pictures: nothing is worked out first."""
        return images

    def predict(
        self,
        images: Images,
        given: Sequence[Instances] | None = None,
        *,
        features: Any = None,
        margin: float = 0.0,
    ) -> list[Instances]:
        """See ``Segmenter``; without ``given`` and ``margin``."""
        if given is not None:
            raise self.session.refuse(
                "asked about given boxes (--tta, evaluate without --boxes detected)"
            )
        if margin:
            raise self.session.refuse("asked for a margin")
        return _run(self.session, images.to("cpu"), self.session.least)


def open_exported(path: Path | str) -> tuple[Exported, Session]:
    """An exported file as a model, with what its metadata says.

    Raises:
        InputError: see ``exported.Session``.
    """
    session = Session(Path(path), threads=torch.get_num_threads())
    return Exported(session, len(session.categories)).eval(), session
