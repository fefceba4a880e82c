"""A run: build the rows; for every mode and point warm up, check that outputs agree, then take interleaved rounds.

Each round runs every row once and begins with another: drift meets all alike, a speed-up is a ratio of neighbours.
"""

import functools
import gc
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import stf_kernels

from .. import meters, results
from ..command import progress
from ..kernels.problems import reference_projector
from ..results import first_line
from ..roofline import measure_ceilings
from . import models
from .floors import cost_on_a_gpu, with_floor
from .modes import MODES, Eager
from .presets import Point, points
from .table import compare_rows, refusal, speedup_field

# row -> the row whose outputs it must repeat
TWINS = {"llava-stf/fused": "llava-stf/reference", "llava-1.5-skip/mlp2x": "llava-1.5/mlp2x"}
BROKEN = "does not work here"


def free(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def agreements(cells: list[Eager], eager: list[Eager]) -> list[dict[str, Any]]:
    """Twins against each other; in other modes also each row against its own eager outputs.

    Image features are read in the language model's inputs_embeds: insertion is compared too, which logits would hide.
    """
    ours, known = ({cell.row.name: cell for cell in group if cell.ready} for group in (cells, eager))
    pairs = [(f"{a} against {b}", ours.get(a), ours.get(b), meters.FEATURES) for a, b in TWINS.items()]
    pairs += [(f"{name} against its eager run", ours[name], known.get(name), meters.ACROSS) for name in ours]
    checks, where = [], f"{cells[0].point}, {cells[0].mode}"
    for title, a, b, bounds in pairs:
        if a is None or b is None or a is b:
            continue
        if a.features is not None and b.features is not None:
            checks.append(meters.compare(f"image features, {title}, {where}", a.features, b.features, bounds))
        checks.append(meters.compare(f"logits, {title}, {where}", a.logits, b.logits, meters.LOGITS))
    return checks


class Run:
    """Measures into `result`, and saves it to `path` after every round."""

    def __init__(self, args: Any, device: str, until: float, path: Path, flags: dict[str, Any]) -> None:
        self.args, self.preset, self.device, self.until, self.path = args, args.preset, device, until, path
        self.gpu = device == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.plan = [(mode, point) for point in points(args, args.preset) for mode in args.modes]
        tiled, tf32 = bool(self.preset.size), torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.fewest, self.most = args.rounds or 3, args.rounds or (20 if self.gpu else 4 if tiled else 6)
        self.process = models.image_processor(self.preset)
        self.cells: list[Eager] = []
        self.result = results.describe("prefill", device) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "preset": self.preset.name + f", {self.preset.tiles} tiles" * tiled,
            "attention": "sdpa",
            "weights": f"{args.model.name}, LLaVA-STF's projector random" if args.model else "random",
            "flags": {**flags, "threads": torch.get_num_threads(), "tf32": tf32},
            "checks": [],
            "rows": [],
            "clocks_mhz": [],
        }

    def save(self) -> None:
        results.check(self.result, str(self.path))
        results.write(self.path, self.result)

    def measure(self) -> None:
        rows, complete = 5 if self.args.full else 2 if self.preset.size else 3, True
        with progress(2 + len(self.plan) * (rows + self.most)) as self.begin, torch.no_grad():
            self.begin("measuring the ceilings of this device")
            self.ceilings = measure_ceilings(self.device, self.dtype)
            self.build()
            for index, (mode, point) in enumerate(self.plan):
                if index and time.monotonic() > self.until:
                    complete, why = False, "not measured, the time budget ended before; --budget SECONDS raises it"
                    self.result["notes"].append(f"{mode}, {point}: {why}")
                    continue
                cells = self.warm_up(mode, point)
                now = time.monotonic()
                self.rounds(cells, now + (self.until - now) / (len(self.plan) - index))
        low = min((ratio for row in self.result["rows"] if (ratio := row["floor_ratio"]["total_ms"])), default=1.0)
        if low < 0.97:
            self.result["notes"].append(f"a total is {low:.2f} of its floor: ceilings taken while others ran")
        if self.preset.size and self.preset.name != "tiny":
            self.result["notes"].append(cost_on_a_gpu(self.preset))
        self.result["complete"] = complete
        self.save()

    def build(self) -> None:
        """The rows, after a check of the exact warm start against the stock model's pooled image features."""
        args, factory = self.args, {"device": self.device, "dtype": self.dtype}
        self.begin(f"building {self.preset.family} ({self.preset.name}), weights: {self.result['weights']}")
        stock = models.load_stock(args.model, **factory) if args.model else models.build_stock(self.preset, **factory)
        self.rows = models.build_rows(stock, self.preset, full=args.full)
        pixels, fresh = self.process(args.image, 1).to(**factory), self.rows[-1].module.model
        # Of one tile where there are many; how they are packed is the stock class's own code.
        pixels, fused = pixels.flatten(0, -4)[:1], fresh.multi_modal_projector
        layer = self.rows[0].module.config.vision_feature_layer
        hidden = stock.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
        pooled = models.Pool(self.preset.merge_size)(stock.model.multi_modal_projector(hidden[:, fused.skip_tokens :]))
        pairs = {"warm start against the pooled stock projector": (fresh.project_images(pixels), pooled)}
        # From here on dense random weights: the warm start's zeros could run faster than a trained projector.
        models.randomise(fused, 1)
        if self.preset.size:
            blocks, plain = fresh.encode_blocks(pixels), reference_projector(fused)
            pairs["fused against reference"] = [module(blocks, fresh.vision_grid) for module in (fused, plain)]
        self.result["checks"] += [meters.compare(name, *pair, meters.FEATURES) for name, pair in pairs.items()]

    def warm_up(self, mode: str, point: Point) -> list[Eager]:
        pixels = self.process(self.args.image, point.batch * point.images)

        @functools.cache
        def inputs(image_tokens: int) -> dict[str, torch.Tensor]:
            return models.build_inputs(self.preset, pixels, point, image_tokens, device=self.device, dtype=self.dtype)

        # Only on a CPU: there running out of memory ends the process.
        short = None if self.gpu else meters.shortage(self.preset.activation_bytes(point, 4), self.device)
        cells = [MODES[mode](row, point, self.device) for row in self.rows]
        for cell in cells:
            self.begin(f"{mode}, {point}: warm-up of {cell.row.name}")
            try:
                if short:
                    raise MemoryError(short)
                images = (point.batch * point.images,)  # no selection falls into what is timed
                stf_kernels.prepare(cell.row.module, batch_sizes=images, grid=(self.preset.grid, self.preset.grid))
                cell.warm_up(inputs(cell.row.image_tokens))
            except (torch.OutOfMemoryError, MemoryError) as error:
                cell.failed = f"does not fit into memory ({first_line(error)})"
                free(self.device)
            except Exception as error:  # a defect of one row must not cost the others'
                traceback.print_exc()
                cell.failed = f"{mode} {BROKEN} ({first_line(error)})"
        known = [cell for cell in self.cells if (cell.mode, cell.point) == ("eager", point)]
        self.result["checks"] += agreements(cells, known)
        self.cells += cells
        self.publish()
        return cells

    def rounds(self, cells: list[Eager], until: float) -> None:
        """No round begins that would end after `until`, once there are `fewest`."""
        where, running, longest = f"{cells[0].mode}, {cells[0].point}", [cell for cell in cells if cell.ready], 0.0
        for taken in range(self.most if running else 0):
            start = time.monotonic()
            if taken >= self.fewest and start + longest > until:
                planned = f"{taken} rounds fitted into the time budget, {self.most} were planned"
                self.result["notes"].append(f"{where}: {planned}; --budget SECONDS or --rounds N takes more")
                break
            self.begin(f"{where}: round {taken + 1} of {self.most}")
            shift = taken % len(running)
            for cell in running[shift:] + running[:shift]:
                cell.samples.append(cell.run())
            self.publish()
            longest = max(longest, time.monotonic() - start)
        if self.gpu:  # right behind the work: before it, a GPU idles at a clock of its own
            self.result["clocks_mhz"].append(results.clock_mhz())
        for cell in cells:
            cell.release()
        free(self.device)

    def publish(self) -> None:
        """Speed-ups from the rows measured so far, or the reason why there are none, into the file."""
        result, item = self.result, self.dtype.itemsize
        result["ceilings"] = asdict(self.ceilings)
        result["rows"] = [with_floor(cell.as_dict(), self.preset, self.ceilings, item) for cell in self.cells]
        result["refused"] = refusal(result["checks"])
        result["comparisons"] = [] if result["refused"] else compare_rows(result["rows"])
        result["speedup"] = speedup_field(result["comparisons"])
        self.save()
