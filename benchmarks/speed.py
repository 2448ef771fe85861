"""Whole pictures, from the file to COCO's RLE: what BRefine costs over torchvision's Mask R-CNN.

    python benchmarks/speed.py [--short-side 400 800] [--threads 1 2] [--detections 1 10 100 300]
        [--ways PATTERN ...] [--rounds 3] [--again] [--tables-only]

Ways to predict: torchvision's Mask R-CNN on the trunk of the full recipe; RECIPE:naive, the full
head by the book (all classes, all RoIs at once, plain convolutions, torchvision's RoIAlign);
RECIPE, as `Predictor` runs it; RECIPE:onnx and RECIPE:openvino, exported, beside RECIPE:torch,
which finds the same. Weights are random, with norms and scores like those of trained ones.
PyTorch's ways get the same boxes in the place of what they find. Exported graphs cannot be told
what to find: their threshold lets as many boxes pass as were asked for, and RECIPE:torch has it,
too.

All ways of a size, a number of threads and a number of detections take turns. Every figure goes
to benchmarks/results/speed.json as soon as it is there; what stands there is not measured again
without --again. The tables in docs/speed.md are written anew from that file in the end. The whole
takes hours; --short-side and the others do a part of it.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from brefine import exported, speed, weights
from brefine.data.pictures import network_size
from brefine.export import export
from brefine.methods import create
from brefine.parts import roi
from brefine.parts.backbone import Backbone
from brefine.parts.box_head import detect
from brefine.parts.inference import prepare
from brefine.predict import Predictor
from brefine.progress import Progress
from brefine.recipe import Recipe
from brefine.sources import as_pixels
from brefine.structures import Category, Images, InputError, Instances
from page import (
    describe_machine,
    print_machine,
    read_results,
    table,
    write_results,
    write_tables,
)

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
SIZE = (480, 640)  # of the picture
MOST = 300  # detections that exported graphs can give
LIMIT = 1e-4  # between probabilities of the naive head and ours

Run = Callable[[], int]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short-side", type=int, nargs="+", default=[400, 800])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--detections", type=int, nargs="+", default=[1, 10, 100, MOST])
    parser.add_argument("--ways", nargs="+", default=["*"], help="patterns; torchvision always")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", default="brefine_r50_1x", help="recipe")
    parser.add_argument("--baseline", default="mask_rcnn_r50_1x", help="recipe")
    parser.add_argument(
        "--light",
        nargs="*",
        default=["brefine_light_r50_1x", "brefine_light_lite0"],
        help="recipes",
    )
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--skip-peaks", action="store_true", help="no peaks of memory")
    parser.add_argument("--tables-only", action="store_true", help="write the page, no more")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/speed.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/speed.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # a way: in a process of its own
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # its exported file
    parser.add_argument("--least", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    bench = Bench(options)
    if options.peak:
        print(bench.peak(options.peak, options.short_side[0], options.detections[0]))
        return
    if not options.tables_only:
        with tempfile.TemporaryDirectory() as place:
            bench.measure(Path(place))
    write_tables(options.page, "speed", tables(read_results(options.results)))
    print(options.page)


class Case(NamedTuple):
    """What all ways are compared at."""

    short_side: int
    threads: int
    detections: int

    def __str__(self) -> str:
        return f"{self.short_side} px, {self.threads} threads, {self.detections} detections"


class Bench:
    """Builds the ways, lets them take turns, and keeps the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.picture = speed.draw_picture(SIZE)
        self.recipes = {}
        for name in (options.full, options.baseline, *options.light):
            path = Path(name) if Path(name).suffix else RECIPES / f"{name}.yaml"
            if path.is_file():
                self.recipes[path.stem] = Recipe.load(path)
            else:
                print(f"{name}: no such recipe: left out", file=sys.stderr)
        self.full, self.baseline = (Path(each).stem for each in (options.full, options.baseline))
        self.files: dict[str, Path] = {}
        self.predictor, self.theirs = cache(self._predictor), cache(self._theirs)
        self.scores = cache(self._scores)

    def ways(self) -> list[str]:
        """All there are: torchvision's first."""
        ways = ["torchvision", f"{self.full}:naive", self.full]
        others = [name for name in self.recipes if name != self.full]
        for name in others:
            if _trunk(self.recipes[name]) != _trunk(self.recipes[self.full]):
                ways.append(f"torchvision:{name}")
            ways.append(name)
        for name in [self.full, *others]:
            if name != self.baseline:
                ways += [f"{name}:{kind}" for kind in ("torch", *exported.FORMATS)]
        return ways

    # --- measuring

    def measure(self, place: Path) -> None:
        """All that is asked for and not in the results yet."""
        options = self.options
        empty: dict[str, Any] = {"cases": {}, "peaks": {}, "difference": {}}
        results = empty | read_results(options.results) | {"machine": describe_machine()}
        everything = self.ways()
        chosen = [w for w in everything if any(fnmatch(w, pattern) for pattern in options.ways)]
        chosen = [way for way in chosen if way != "torchvision"]
        cases = [
            Case(side, threads, detections)
            for side in options.short_side
            for threads in options.threads
            for detections in options.detections
        ]

        def missing(known: dict[str, Any]) -> list[str]:
            return [way for way in chosen if options.again or way not in known]

        todo = [(case, missing(results["cases"].get(_key(case), {}))) for case in cases]
        turns = sum((len(ways) + 1) * (options.rounds + 1) for _, ways in todo if ways)
        for name in {way.partition(":")[0] for _, ways in todo for way in ways if _exported(way)}:
            self._export(name, place)
        with Progress("speed", turns) as progress:
            for case, ways in todo:
                if ways:
                    measured = self._take_turns(case, ways, progress)
                    known = results["cases"].setdefault(_key(case), {})
                    known.update(measured)
                    write_results(options.results, results)
        detections = 100 if 100 in options.detections else max(options.detections)
        for side in options.short_side:
            known = results["peaks"].setdefault(f"{side}/{detections}", {})
            ways = [way for way in missing(known) if not way.endswith(":torch")]
            if options.again or "torchvision" not in known:
                ways = ["torchvision", *ways]
            for way in () if options.skip_peaks else ways:
                if (peak := self._peak_of(way, side, detections)) is not None:
                    known[way] = peak
                    write_results(options.results, results)
            if f"{self.full}:naive" in chosen and (
                options.again or str(side) not in results["difference"]
            ):
                results["difference"][str(side)] = self.difference(side, detections)
                write_results(options.results, results)
        for side, difference in results["difference"].items():
            for part, apart in difference.items():
                verdict = "" if apart < LIMIT else f": MORE THAN {LIMIT}"
                print(f"{side} px: naive and exact masks differ by {apart:.1e} ({part}){verdict}")

    def _take_turns(
        self, case: Case, ways: Sequence[str], progress: Progress
    ) -> dict[str, dict[str, Any]]:
        torch.set_num_threads(case.threads)
        runs = {}
        for way in ("torchvision", *ways):
            try:
                runs[way] = self.open(way, case)
            except InputError as error:
                print(f"{way}: left out: {error}", file=sys.stderr)
                progress.advance(self.options.rounds + 1)
        times: dict[str, list[tuple[float, ...]]] = {way: [] for way in runs}
        objects = {}
        for number in range(self.options.rounds + 1):
            for way, run in runs.items():
                timer = speed.Timer()
                objects[way] = run()
                if number:  # the first warms up
                    times[way].append(timer())
                progress.advance(figures=f"{case}: {way}")
        medians = {
            way: [statistics.median(each) for each in zip(*taken, strict=True)]
            for way, taken in times.items()
        }
        base = medians["torchvision"]
        return {
            way: {
                "cpu": cpu,
                "wall": wall,
                "cpu_ratio": cpu / base[0],
                "wall_ratio": wall / base[1],
                "rounds": self.options.rounds,
                "objects": objects[way],
            }
            for way, (cpu, wall) in medians.items()
        }

    def _peak_of(self, way: str, side: int, detections: int) -> float | None:
        """Megabytes, from a process that does nothing else."""
        options = self.options
        command = [sys.executable, __file__, "--peak", way, "--classes", str(options.classes)]
        command += ["--full", options.full, "--baseline", options.baseline]
        command += ["--light", *options.light]
        command += ["--short-side", str(side), "--detections", str(detections)]
        if _exported(way):
            name, _, kind = way.partition(":")
            if name not in self.files:
                return None
            file = self.files[name].with_suffix(exported.FORMATS[kind])
            if not file.is_file():  # the other format's is there
                return None
            command += ["--file", str(file), "--least", str(self._least(name, side, detections))]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(found.stdout.split()[-1])

    def peak(self, way: str, side: int, detections: int) -> float:
        """Megabytes by which this process grows: the model and one picture."""
        torch.set_num_threads(1)
        before = speed.resident("VmRSS")
        case = Case(side, 1, detections)
        if self.options.file:
            run = self._open_exported(self.options.file, case, self.options.least)
        else:
            run = self.open(way, case)
        run()
        return (speed.resident("VmHWM") - before) / 1e6

    def difference(self, side: int, detections: int) -> dict[str, float]:
        """Between the mask probabilities of the naive head and ours, at most.

        ``whole``: each with features of its own trunk, whose norms are apart or folded.
        ``head``: both with those of the naive one.
        """
        case = Case(side, torch.get_num_threads(), detections)
        forced = self._forced(self.full, case)
        scale = torch.tensor([SIZE[1] / forced.size[1], SIZE[0] / forced.size[0]]).repeat(2)
        given = Instances(SIZE, forced.boxes * scale, forced.labels)
        ours, naive = (
            self._sized(self.predictor(way), side) for way in (self.full, f"{self.full}:naive")
        )

        def masks(predictor: Predictor) -> Tensor:
            logits = predictor.given(self.picture, given).logits
            assert logits is not None
            return logits.sigmoid()

        expected, whole = masks(naive), masks(ours)
        model: Any = ours.model
        model.features = cast(Any, naive.model).features
        head = masks(ours)
        del model.features  # the instance's, so that the class's is there again
        return {
            "head": float((head - expected).abs().max()),
            "whole": float((whole - expected).abs().max()),
        }

    # --- the ways

    def open(self, way: str, case: Case) -> Run:
        """What predicts the picture and says how many objects it found."""
        name, _, kind = way.partition(":")
        if name == "torchvision":
            recipe = kind or self.full
            model = self.theirs(recipe)
            short, long = self._limits(recipe, case.short_side)
            model.transform.min_size, model.transform.max_size = (short,), long
            system = speed.torchvisions(model, self.picture, self._forced(recipe, case))
        elif kind in ("", "naive"):
            predictor = self._sized(self.predictor(way), case.short_side)
            system = speed.ours(predictor, self.picture, self._forced(name, case))
        elif kind == "torch":
            predictor = self._sized(self.predictor(way), case.short_side)
            least = self._least(name, case.short_side, case.detections)

            def ours() -> int:
                predictor.model.box_head.score_threshold = least  # type: ignore[attr-defined]
                return len(predictor.records(self.picture, 0, threshold=0.0))

            return ours
        else:
            if name not in self.files:
                raise InputError("not exported")
            least = self._least(name, case.short_side, case.detections)
            file = self.files[name].with_suffix(exported.FORMATS[kind])
            return self._open_exported(file, case, least)
        return lambda: len(system(speed.Meter(speed.Timer())))

    def _open_exported(self, file: Path, case: Case, least: float) -> Run:
        model = exported.load(file, case.threads)
        session = model.session
        scale = case.short_side / session.short_side
        session.short_side, session.long_side = case.short_side, round(session.long_side * scale)
        session.least = least
        return lambda: len(model(Image.open(io.BytesIO(self.picture)), threshold=0.0))

    def _predictor(self, way: str) -> Predictor:
        name, _, kind = way.partition(":")
        recipe = self.recipes[name]
        model = settle(build(recipe, self.options.classes))
        if kind == "naive":
            model.mask_head = NaiveHead(model.mask_head)
            model._masks = lambda *inputs: model.mask_head(*inputs)  # all RoIs at once
        else:
            model = prepare(model)
        data = recipe.data
        return Predictor(
            model,
            _table(self.options.classes),
            short_side=data.short_side[-1],
            long_side=data.long_side,
            device="cpu",
        )

    def _theirs(self, name: str) -> Any:
        recipe = self.recipes[name]
        trunk = build(recipe, self.options.classes).trunk
        return speed.reference(trunk, self.options.classes, 800, 1333, _proposals(recipe))

    def _limits(self, name: str, short_side: int) -> tuple[int, int]:
        data = self.recipes[name].data
        return short_side, round(data.long_side * short_side / data.short_side[-1])

    def _sized(self, predictor: Predictor, short_side: int) -> Predictor:
        sized = copy.copy(predictor)
        scale = short_side / predictor.short_side
        sized.short_side, sized.long_side = short_side, round(predictor.long_side * scale)
        return sized

    def _forced(self, name: str, case: Case) -> speed.Forced:
        size = network_size(SIZE, *self._limits(name, case.short_side))
        proposals = _proposals(self.recipes[name])
        if case.detections > proposals:
            raise InputError(f"it looks at {proposals} proposals only")
        return speed.Forced.draw(size, proposals, case.detections, self.options.classes)

    def _least(self, name: str, side: int, detections: int) -> float:
        """The threshold that as many detections pass, of a model that is told nothing."""
        scores = self.scores(name, side)
        if len(scores) < detections:
            raise InputError(f"it finds {len(scores)} objects at most")
        above = scores[detections - 1 : detections + 1]
        return float(above.mean() if len(above) > 1 else above[0] * (1 - 1e-6))

    @torch.inference_mode()
    def _scores(self, name: str, side: int) -> Tensor:
        """Those of the detections of a model that is told nothing, best first."""
        predictor = self._sized(self.predictor(f"{name}:torch"), side)
        model: Any = predictor.model
        model.box_head.detections = MOST
        images, _ = predictor._resize(as_pixels(self.picture))
        features = model.features(images)
        proposed = model.rpn(features[: len(Backbone.strides)])
        proposals = model.rpn.propose(*proposed, images.sizes, training=False)
        # NMS is quadratic: from above, until enough pass
        for least in (0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01, 0.003, 0.0):
            model.box_head.score_threshold = least
            (found,) = detect(model.box_head, features, proposals, images.sizes)
            if len(found) == MOST:
                break
        assert found.scores is not None
        return found.scores.float()

    def _export(self, name: str, place: Path) -> None:
        """Export a model to both formats, if it can be."""
        # what is asked for, and no larger: the check of a file takes its time
        short, long = self._limits(name, max(self.options.short_side))
        most = max(self.options.detections)
        settings = [f"model.options.detector.detections={most}"]
        settings += [f"data.short_side={short}", f"data.long_side={long}"]
        recipe = self.recipes[name].with_settings(settings)
        model = settle(build(recipe, self.options.classes))
        folder = place / name
        weights.save(folder, model, recipe, _table(self.options.classes))
        for format, suffix in exported.FORMATS.items():
            file = folder.with_suffix(suffix)
            try:
                parity = export(folder, file, format)
            except Exception as error:  # the others can be measured nevertheless
                first = str(error).strip().partition("\n")[0]
                print(f"{name}: no {format}: {type(error).__name__}: {first}", file=sys.stderr)
                continue
            print(f"{name}, {format}: {parity}", file=sys.stderr)
            self.files[name] = file


class NaiveHead(nn.Module):
    """The full mask head as the paper draws it, without any saving."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """``[R, S, S]``."""
        head = self.head
        x = self._pool(features[: head.num_levels], rois, 14)
        for conv in head.main:
            x = conv(x)
        lines = zip(head.auxiliary, head.context, strict=True)
        for stage, (auxiliary, context) in enumerate(lines):
            if stage:
                x = functional.interpolate(x, scale_factor=2.0, mode="bilinear")
            x = context(x + auxiliary(self._pool(features[:1], rois, 14 << stage)))
        every = functional.conv2d(x, head.logits.weight, head.logits.bias)  # [R, K, S, S]
        return every[torch.arange(len(rois)), labels]

    def _pool(self, features: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
        level = roi.level(rois, len(features), self.head.finest)
        pooled = features[0].new_empty(len(rois), features[0].shape[1], size, size)
        for i, feature in enumerate(features):
            here = level == i
            scale, aligned = 1 / (4 << i), self.head.convention.aligned
            pooled[here] = roi_align(feature, rois[here], size, scale, 0, aligned)
        return pooled


def build(recipe: Recipe, classes: int) -> Any:
    """A recipe's model; the same random weights each time."""
    torch.manual_seed(0)
    model: Any = create(recipe.model.method, classes, **recipe.model.options)
    return model.eval()


@torch.no_grad()
def settle(model: Any) -> Any:
    """Give random weights the statistics of trained ones, in place.

    Norms know what they normalise, levels of the pyramid have unit variance, and scores, boxes
    and masks differ as those of a trained model do.
    """
    body, fpn = model.trunk.body, model.trunk.fpn
    norms = [each for each in body.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)  # some start at 0, which hides what is before
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None
    # smooth pictures and noise: one is a stranger to the other's statistics, and scores are all 1
    random = torch.rand(4, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    smooth = functional.interpolate(255 * random, size=(192, 256), mode="bicubic").clamp(0, 255)
    noise = torch.randn(4, 3, 192, 256, generator=torch.Generator().manual_seed(0))
    pictures = torch.cat([(smooth - model.trunk.mean) / model.trunk.std, noise])
    body(pictures)
    for norm in norms:
        norm.eval()
    for block, feature in zip(fpn.inner_blocks, body(pictures), strict=True):
        block[0].weight /= feature.std() + 1e-6
    for norm in model.modules():  # weights of 1 and biases of 0 would be left out of a graph
        if isinstance(norm, nn.GroupNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.1, 0.1)
    pixels = as_pixels(speed.draw_picture((192, 256)))
    images = Images.stack([pixels])
    forced = speed.Forced.draw((192, 256), 20, 20, model.num_classes)
    features = model.features(images)
    _, logits, deltas = model.rpn(features[: len(Backbone.strides)])
    _spread(model.rpn.objectness, torch.cat(logits, 1), 3)
    _spread(model.rpn.deltas, torch.cat(deltas, 1), 0.1)
    logits, deltas = model.box_head(features, torch.cat([torch.zeros(20, 1), forced.boxes], 1))
    _spread(model.box_head.classes, logits, 2)
    _spread(model.box_head.deltas, deltas, 0.3)
    given = Instances(forced.size, forced.boxes, forced.labels)
    (found,) = model.predict(images, [given])
    for layer in model.mask_head.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == model.num_classes:
            layer.weight *= 4 / found.logits.std()
    return model


def _spread(layer: Any, output: Tensor, wanted: float) -> None:
    """Scale a layer so that its output has this standard deviation."""
    layer.weight *= wanted / output.std()


def _table(classes: int) -> list[Category]:
    return [Category(i, str(i)) for i in range(1, classes + 1)]


def _trunk(recipe: Recipe) -> Any:
    return recipe.model.options.get("backbone")


def _proposals(recipe: Recipe) -> int:
    detector = recipe.model.options.get("detector", {})
    return int(detector.get("proposals", (1000, 1000))[1])


def _exported(way: str) -> bool:
    return way.partition(":")[2] in exported.FORMATS


def _key(case: Case) -> str:
    return "/".join(map(str, case))


# --- results


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    if not results:
        return ""
    text = "\n" + print_machine(results["machine"])
    cases = {Case(*map(int, key.split("/"))): ways for key, ways in results["cases"].items()}
    for side, threads in sorted({case[:2] for case in cases}):
        mine = {c.detections: ways for c, ways in cases.items() if c[:2] == (side, threads)}
        clock = "cpu" if threads == 1 else "wall"
        seconds = "CPU seconds" if threads == 1 else "seconds on the clock"
        rounds = {record["rounds"] for ways in mine.values() for record in ways.values()}
        text += (
            f"Short side {side}, {_threads(threads)}: ratio to torchvision's Mask R-CNN "
            f"({seconds}), medians of {_range(rounds)} rounds, by detections:\n\n"
        )
        counts = sorted(mine)
        rows = [
            [f"`{way}`", *(_cell(mine[count].get(way), clock, count) for count in counts)]
            for way in dict.fromkeys(way for count in counts for way in mine[count])
        ]
        text += table(["way", *map(str, counts)], rows)
    peaks = {tuple(map(int, key.split("/"))): ways for key, ways in results["peaks"].items()}
    if sides := sorted(key for key, ways in peaks.items() if ways):
        text += "Peak memory in MB above that of a process with everything imported:\n\n"
        rows = [
            [f"`{way}`", *(f"{peaks[s][way]:.0f}" if way in peaks[s] else "" for s in sides)]
            for way in dict.fromkeys(way for each in sides for way in peaks[each])
        ]
        text += table(["way", *(f"{s} px, {n} detections" for s, n in sides)], rows)
    for side, difference in results["difference"].items():
        text += (
            f"Short side {side}: probabilities of naive and exact masks differ by at most "
            f"{difference['head']:.1e} with the same features, and {difference['whole']:.1e} with "
            "those of their own trunks.\n\n"
        )
    return text


def _cell(record: dict[str, Any] | None, clock: str, count: int) -> str:
    if record is None:
        return ""
    other = "" if record["objects"] == count else f", {record['objects']} objects"
    return f"{record[f'{clock}_ratio']:.2f} ({record[clock]:.2f} s{other})"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
