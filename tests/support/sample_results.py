"""Result files of known content, for the tests of the page and of its rendering in tests/browser."""

STAGES = ("vision_ms", "projector_ms", "insert_ms", "prefill_ms", "first_token_ms")
PLACE = {"text_tokens": 40, "images": 1, "mode": "eager"}


def prefill_row(model, projector, batch, samples):
    total = sorted(samples)[len(samples) // 2]
    times = {**dict.fromkeys(STAGES, total / 5), "total_ms": total}
    row = {"model": model, "projector": projector, "batch": batch, **PLACE, **times, "image_tokens": 144, "rounds": 4}
    row |= {"projector_share": 0.2, "spread_percent": 4.0, "peak_mb": 10.0, "kv_mb": 1.0}
    return row | {"failed": None, "floor_ratio": dict.fromkeys(times, 1.7), "samples": {"total_ms": samples}}


def comparison(batch, ratio, low, high):
    found = {"row": "llava-stf/fused", "baseline": "llava-1.5/mlp2x", "batch": batch, **PLACE, "beyond_noise": True}
    return {**found, "baseline_mode": "eager", "ratio": ratio, "low": low, "high": high}


def prefill_result():
    return {
        **{"schema": 1, "kind": "prefill", "complete": True, "device": "GPU <1>", "torch": "2", "transformers": "5"},
        **{"triton": "3", "commit": "abc", "dtype": "bfloat16", "preset": "7b", "attention": "sdpa"},
        **{"weights": "random", "speedup": {}, "refused": None, "notes": [], "flags": {"threads": 3}},
        "ceilings": {"flops": 2e14, "bandwidth": 3e12, "source": "measured in this run"},
        "clocks_mhz": [1980.0, None, 1755.0],
        "checks": [{"name": "features", "error": 1e-6, "bound": 1e-5, "agrees": True}],
        "rows": [
            prefill_row("llava-1.5", "mlp2x", 1, [120.0, 123.25, 123.25, 125.0]),
            prefill_row("llava-stf", "reference", 1, [60.0, 60.6, 60.6, 62.0]),
            prefill_row("llava-stf", "fused", 1, [50.0, 50.5, 50.5, 51.0]),
            prefill_row("llava-1.5", "mlp2x", 8, [800.0] * 4),
            prefill_row("llava-stf", "fused", 8, [300.0] * 4),
        ],
        "comparisons": [comparison(1, 2.44, 2.4, 2.45), comparison(8, 2.67, 2.6, 2.7)],
    }


def kernel_row(provider, us, batch=1, **change):
    row = {"stage": "chain", "pass": "forward", "batch": batch, "dtype": "bfloat16", "provider": provider, "us": us}
    row |= {"us_eager": us, "floor_us": 100.0, "rel_error": 1e-3, "peak_mb": 5.0, "failed": None, "samples": [us]}
    return row | change


def kernels_result(*rows):
    found = {"schema": 1, "kind": "kernels", "complete": True, "device": "GPU <1>", "torch": "2", "triton": "3"}
    rows = rows or (kernel_row("eager", 300.0), kernel_row("stf", 200.0), kernel_row("conv2d", 190.0))
    return found | {"commit": "abc", "clock_mhz": 1, "sizes": "small", "notes": [], "rows": list(rows)}
