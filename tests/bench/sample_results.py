"""Result files of known content, for the tests of the page and of its rendering in tests/browser."""

STAGES = ("vision_ms", "projector_ms", "insert_ms", "prefill_ms", "first_token_ms")


SAVINGS = {"unused-tower-layers": "unread layers do not run", "in-place-insertion": "rows <written> in place"}


def prefill_row(model, projector, batch, total, samples, savings=()):
    times = dict.fromkeys(STAGES, total / 5)
    return {
        "model": model, "projector": projector, "batch": batch, "image_tokens": 144, "text_tokens": 40, "mode": "eager",
        **times, "total_ms": total, "preprocess_ms": 3.0, "decode_ms_per_token": None, "projector_share": 0.2,
        "shares": dict.fromkeys(STAGES, 0.2),
        "spread_percent": 4.0, "floor_ratio": dict.fromkeys((*STAGES, "total_ms"), 1.7), "peak_mb": 10.0, "kv_mb": 1.0,
        "failed": None, "savings": list(savings), "samples": {"total_ms": samples},
        "wall_samples": {name: [total / 4, total / 4] for name in (*STAGES, "total_ms")},
    }  # fmt: skip


def prefill_result():
    comparison = {"row": "llava-stf/fused", "baseline": "llava-1.5/mlp2x", "text_tokens": 40, "mode": "eager",
                  "baseline_mode": "eager", "beyond_noise": True}  # fmt: skip
    saving = {**comparison, "row": "llava-stf/fused+savings"}
    return {
        "schema": 1, "kind": "prefill", "complete": True, "device": "GPU <1>", "dtype": "bfloat16", "torch": "2",
        "triton": "3", "transformers": "5", "commit": "abc", "preset": "7b", "speedup": {}, "refused": None,
        "notes": [], "savings_mean": dict(SAVINGS),
        "checks": [{"name": "features", "error": 1e-6, "bound": 1e-5, "agrees": True}],
        "rows": [
            prefill_row("llava-1.5", "mlp2x", 1, 123.25, [120.0, 123.25, 123.25, 125.0]),
            prefill_row("llava-stf", "fused", 1, 50.5, [50.0, 50.5, 50.5, 51.0]),
            prefill_row("llava-1.5", "mlp2x", 8, 800.0, [800.0] * 4),
            prefill_row("llava-stf", "fused", 8, 300.0, [300.0] * 4),
            prefill_row("llava-stf", "fused", 1, 48.5, [48.0, 48.5, 48.5, 49.0], SAVINGS),
            prefill_row("llava-stf", "fused", 8, 290.0, [290.0] * 4, SAVINGS),
        ],
        "comparisons": [
            {**comparison, "batch": 1, "ratio": 2.44, "low": 2.4, "high": 2.45},
            {**comparison, "batch": 8, "ratio": 2.67, "low": 2.6, "high": 2.7},
            {**saving, "batch": 1, "ratio": 2.54, "low": 2.5, "high": 2.55},
            {**saving, "batch": 8, "ratio": 2.76, "low": 2.7, "high": 2.8},
        ],
    }  # fmt: skip


KERNELS = {
    "schema": 1, "kind": "kernels", "device": "GPU <1>", "torch": "2", "triton": "3", "commit": "abc", "clock_mhz": 1,
    "rows": [
        {"stage": "chain", "pass": "forward", "batch": batch, "dtype": "bfloat16", "provider": provider, "us": us,
         "us_eager": 2 * us, "floor_us": 100.0, "rel_error": 1e-3, "samples": [us], "failed": None}
        for batch in (1, 8) for provider, us in (("eager", 300.0), ("stf", 200.0))
    ],
}  # fmt: skip
