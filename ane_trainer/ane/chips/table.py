"""Pure tables behind `chips.py`: one row per chip, one row per claimed limit; every figure with its source.

Evidence reads `kind: source`; kinds are `measured` (on that silicon), `decompiled` (from Apple's compiler
tables or binaries), `published` (Apple) and `presumed` (inferred; the source says from what). Sources:
"ANE guide" is arXiv:2606.22283 with its chapter or appendix, "M6 notes" is the microarchitecture study of
M6 and M4, "ANEForge" is ANEForge 0.4.0, "maderix", "Orion", "ane-train", "field guide", "Espresso" and
"Core AI article" are the public projects of these names.
"""

from __future__ import annotations

_HAL = "decompiled: compiler clock table, M6 notes and ANE guide ch. 24"
_APPLE = "published: Apple's technical specifications"
_ROOF = "measured: ANEForge roofline results"
_LM_HEAD = "measured: ANEMLL-Bench, Results.MD of 2025-10-29 (fp16 head of a language model, Core ML)"
_CLAMP = "measured: ANEForge numeric_cliffs"
_MAC = "decompiled: 16 cores x 256, M6 notes (compiler table); peak agrees with Apple's TOPS claims"

#: Facts that hold for a whole generation: field -> (value, evidence).
_GENERATIONS: dict[str, dict[str, tuple[object, str]]] = {
    "A13": {
        "width_slice_clamp": (4094.0, _CLAMP + " (M1, M1 Max)"),
        "texture_engine": (False, "measured: ANE guide app. A"),
        "native_sin_cos": (False, "measured: ANE guide app. A"),
        "native_topk_sort": (False, "measured: ANEForge targets table"),
        "native_random": (False, "measured: ANEForge targets table"),
        "winograd": (False, "measured: published 3x3 conv errors fit the direct form (M1, M1 Max)"),
        "reduction_transpose_threshold": (192, "decompiled: ANE guide ch. 4"),
    },
    "A14": {
        "width_slice_clamp": (4094.0, _CLAMP + " (M2 Pro)"),
        "texture_engine": (True, "measured: ANE guide app. A"),
        "native_sin_cos": (False, "measured: ANE guide app. A"),
        "native_topk_sort": (True, "measured: ANEForge targets table"),
        "native_random": (False, "measured: ANEForge targets table"),
        "winograd": (False, "presumed: as on M1 and M4"),
        "reduction_transpose_threshold": (192, "decompiled: ANE guide ch. 4"),
    },
    "A15": {
        "width_slice_clamp": (
            4094.0,
            "presumed: before A16 by ANEForge; ANE guide ch. 12 has A15 exact; nobody measured M3",
        ),
        "texture_engine": (True, "decompiled: ANE guide app. A"),
        "native_sin_cos": (True, "decompiled: ANE guide app. A"),
        "native_topk_sort": (True, "decompiled: ANE guide app. A"),
        "native_random": (True, "decompiled: ANE guide app. A"),
        "winograd": (False, "presumed: as on M1 and M4"),
        "reduction_transpose_threshold": (384, "decompiled: ANE guide ch. 4"),
    },
    "A16": {
        "width_slice_clamp": (None, _CLAMP + " (M4: exact)"),
        "texture_engine": (True, "decompiled: ANE guide app. A"),
        "native_sin_cos": (True, "decompiled: ANE guide app. A"),
        "native_topk_sort": (True, "decompiled: ANE guide app. A"),
        "native_random": (True, "decompiled: ANE guide app. A"),
        "winograd": (False, "measured: published 3x3 conv errors fit the direct form (M4)"),
        "reduction_transpose_threshold": (384, "decompiled: ANE guide ch. 4"),
    },
    "A17": {
        "width_slice_clamp": (None, _CLAMP + " (M5, M5 Pro: exact)"),
        "texture_engine": (True, "measured: ANE guide app. A"),
        "native_sin_cos": (True, "measured: ANEForge vocabulary sweep"),
        "native_topk_sort": (True, "measured: ANEForge vocabulary sweep"),
        "native_random": (True, "decompiled: ANE guide app. A"),
        "winograd": (True, "measured: published 3x3 conv errors of M5 Pro fit F(2, 3) along the width"),
        "reduction_transpose_threshold": (384, "decompiled: ANE guide ch. 4"),
    },
    "A18": {
        "width_slice_clamp": (None, "presumed: as on M4 and M5"),
        "texture_engine": (True, "presumed: as on M5"),
        "native_sin_cos": (True, "measured: M6 notes/numerics.md"),
        "native_topk_sort": (True, "presumed: as on M5"),
        "native_random": (True, "presumed: as on M5"),
        "winograd": (True, "measured: M6 notes/compute_array.md (1.45x over the direct peak)"),
        "reduction_transpose_threshold": (384, "presumed: as on M5"),
    },
}

#: name, title, architecture, generation, aliases, facts. A fact overrides its generation's.
_CHIPS: tuple[tuple[str, str, str, str, str, dict[str, tuple[object, str]]], ...] = (
    ("m1", "M1", "H13", "A13", "h13 a13", {
        "clock_ghz": (1.428, _HAL), "dram_gb_s": (68.0, _APPLE),
        "activation_stream_gb_s": (0.9, _ROOF + "; includes host copies"),
        "dispatch_floor_us": (230.0, "measured: ANE guide ch. 14"),
        "power_fp16_w": (3.61, _ROOF + " (GEMM N=4096, engine rail)"),
        "weight_stream_gb_s": (60.9, _LM_HEAD),
    }),
    ("m1-pro", "M1 Pro", "H13g", "A13", "", {
        "clock_ghz": (1.464, _HAL), "dram_gb_s": (200.0, _APPLE),
        "dispatch_floor_us": (190.0, "presumed: as M1 Max, same architecture"),
        "weight_stream_gb_s": (54.9, _LM_HEAD),
    }),
    ("m1-max", "M1 Max", "H13g", "A13", "h13g", {
        "clock_ghz": (1.464, _HAL), "dram_gb_s": (400.0, _APPLE),
        "weight_stream_gb_s": (54.6, _LM_HEAD + "; ANE guide ch. 9 has 51"),
        "activation_stream_gb_s": (7.4, _ROOF + "; ANE guide ch. 9 has 24"),
        "dispatch_floor_us": (190.0, "measured: ANE guide ch. 2"),
        "power_fp16_w": (3.59, _ROOF + " (GEMM N=4096, engine rail)"),
    }),
    ("m2", "M2", "H14", "A14", "h14 a14", {
        "clock_ghz": (1.938, _HAL), "dram_gb_s": (100.0, _APPLE),
        "weight_stream_gb_s": (60.5, _LM_HEAD),
    }),
    ("m2-pro", "M2 Pro", "H14g", "A14", "h14g", {
        "clock_ghz": (1.938, "presumed: as M2; Apple gives both 15.8 TOPS"), "dram_gb_s": (200.0, _APPLE),
        "activation_stream_gb_s": (1.0, _ROOF + "; includes host copies"),
        "dispatch_floor_us": (100.0, _ROOF + " (about)"),
        "power_fp16_w": (5.9, "measured: ANE guide ch. 10 (compute-bound GEMM, about)"),
        "weight_stream_gb_s": (61.0, "presumed: as M2 and M2 Max"),
    }),
    ("m2-max", "M2 Max", "H14g", "A14", "h14c", {
        "clock_ghz": (1.938, "presumed: as M2; Apple gives both 15.8 TOPS"), "dram_gb_s": (400.0, _APPLE),
        "weight_stream_gb_s": (62.0, _LM_HEAD),
    }),
    ("m3", "M3", "H15", "A15", "h15 a15", {
        "clock_ghz": (2.064, _HAL), "dram_gb_s": (100.0, _APPLE),
        "weight_stream_gb_s": (63.1, _LM_HEAD),
    }),
    ("m3-pro", "M3 Pro", "H15g", "A15", "h15g", {
        "clock_ghz": (2.064, "presumed: as M3; maderix measured 16.8 TFLOP/s of 16.9"),
        "dram_gb_s": (150.0, _APPLE),
        "dispatch_floor_us": (240.0, "measured: ANE-Training (197 to 280)"),
        "weight_stream_gb_s": (63.0, "presumed: as M3, whose clock it has"),
    }),
    ("m3-max", "M3 Max", "H15c", "A15", "h15c", {
        "clock_ghz": (2.364, _HAL + "; that M3 Max is H15c is presumed"), "dram_gb_s": (400.0, _APPLE),
        "weight_stream_gb_s": (120.2, _LM_HEAD),
    }),
    ("m4", "M4", "H16g", "A16", "h16g h16 a16", {
        "clock_ghz": (2.364, _HAL + " (bundle H16G on Mac16,12; 18.8 TFLOP/s measured needs it)"),
        "dram_gb_s": (120.0, _APPLE),
        "activation_stream_gb_s": (7.7, _ROOF),
        "dispatch_floor_us": (92.0, "measured: maderix (90 to 95)"),
        "power_fp16_w": (5.48, _ROOF + " (3x3 conv, engine rail); maderix 4.57, M6 notes 8.7"),
        "weight_stream_gb_s": (64.2, _LM_HEAD),
    }),
    ("m4-pro", "M4 Pro", "H16g", "A16", "", {
        "clock_ghz": (2.364, _HAL), "dram_gb_s": (273.0, _APPLE),
        "weight_stream_gb_s": (126.4, _LM_HEAD),
    }),
    ("m4-max", "M4 Max", "H16s", "A16", "h16s", {
        "clock_ghz": (2.364, _HAL), "dram_gb_s": (546.0, _APPLE),
        "weight_stream_gb_s": (118.9, _LM_HEAD),
    }),
    ("m5", "M5", "H17", "A17", "h17 a17", {
        "clock_ghz": (2.172, _HAL), "dram_gb_s": (153.0, _APPLE),
        "activation_stream_gb_s": (20.0, _ROOF),
        "dispatch_floor_us": (106.0, "measured: ane-infer (106 direct, 117 through the daemon)"),
        "weight_stream_gb_s": (70.2, _LM_HEAD),
    }),
    ("m5-pro", "M5 Pro", "H17s", "A17", "h17s", {
        "clock_ghz": (2.364, _HAL), "dram_gb_s": (307.0, _APPLE),
        "weight_stream_gb_s": (145.0, _ROOF + " (112 to 145)"),
        "activation_stream_gb_s": (24.0, _ROOF),
        "dispatch_floor_us": (75.0, "measured: ANEForge cost table (70 to 83)"),
        "power_fp16_w": (9.81, _ROOF + " (3x3 conv, engine rail)"),
    }),
    ("m5-max", "M5 Max", "H17s", "A17", "h17c h17d", {
        "clock_ghz": (2.364, _HAL),
        "weight_stream_gb_s": (145.0, "presumed: as M5 Pro"),
    }),
    ("m6", "M6", "H18g", "A18", "h18g h18 a18", {
        "clock_ghz": (2.508, _HAL + "; the hardware runs at 2.580"),
        "engines": (2, "measured: M6 notes"),
        "dram_gb_s": (170.0, "measured: M6 notes"),
        "weight_stream_gb_s": (150.0, "measured: M6 notes/memory.md"),
        "activation_stream_gb_s": (37.5, "measured: M6 notes/memory.md (35 to 40 per engine)"),
        "dispatch_floor_us": (160.0, "measured: M6 notes/compute_array.md (Core ML)"),
        "power_fp16_w": (10.8, "measured: M6 notes/power.md (both engines; one takes 6.2)"),
    }),
)  # fmt: skip

#: name, title, family, generation, aliases, facts of every chip, generation facts merged in.
CHIP_ROWS = tuple(
    (name, title, family, generation, tuple(aliases.split()),
     {"mac_per_cycle": (4096, _MAC), "engines": (1, _MAC), **_GENERATIONS[generation], **facts})
    for name, title, family, generation, aliases, facts in _CHIPS
)  # fmt: skip

_APPA = "decompiled: ANE guide app. A (engine limits table; M1 and M5 checked on silicon)"
_M6CML = "measured: M6 notes, Core ML boundary sweep on M4"
_AFCAP = "measured: ANEForge capabilities"
_E5 = "measured: ANEForge e5rt reference"

#: name, families, path, bound, value, unit, evidence, note. Rows of one name may disagree on purpose.
LIMIT_ROWS: tuple[tuple[str, str, str, str, float, str, str, str], ...] = (
    # dimensions
    ("width", "A13-A15", "compiler", "max", 16384, "elements", _APPA, ""),
    ("width", "A16+", "compiler", "max", 65536, "elements", _APPA, ""),
    ("height", "A13-A15", "compiler", "max", 16384, "elements", _APPA, ""),
    ("height", "A16+", "compiler", "max", 65536, "elements", _APPA, ""),
    ("depth", "A13-A15", "compiler", "max", 16384, "elements", _APPA, ""),
    ("depth", "A16+", "compiler", "max", 65536, "elements", _APPA, ""),
    ("channels", "*", "compiler", "max", 65536, "elements", _APPA, ""),
    ("batch", "*", "compiler", "max", 65536, "elements", _APPA, ""),
    ("dimension", "A13-A15", "compiler", "max", 16384, "elements", _APPA, "of width, height, depth"),
    ("dimension", "A16+", "compiler", "max", 65536, "elements", _APPA, "any axis"),
    ("dimension", "m4", "coreml", "max", 65536, "elements", _M6CML, ""),
    ("transpose_extent", "A13-A15", "compiler", "max", 16384, "elements", _APPA, ""),
    ("transpose_extent", "A16+", "compiler", "max", 65536, "elements", _APPA, ""),
    ("rank", "*", "compiler", "max", 5, "axes", "measured: ANE guide ch. 4 and M6 notes", ""),
    ("matmul_rank", "*", "compiler", "max", 4, "axes", "measured: ANE guide ch. 4", "depth axis 1"),
    ("conv_rank", "*", "e5rt", "max", 4, "axes", "measured: ANE guide ch. 8", "Core ML takes 3-D conv on M4"),
    ("matmul_contraction", "A13-A15", "compiler", "max", 16384, "elements", _APPA, ""),
    ("matmul_contraction", "A16+", "compiler", "max", 65536, "elements", _APPA, ""),
    ("matmul_contraction", "m4", "coreml", "max", 32768, "elements", _M6CML, "40000 refused"),
    ("matmul_outputs", "A13-A15", "compiler", "max", 16384, "elements", _APPA, ""),
    ("matmul_outputs", "A16+", "compiler", "max", 65536, "elements", _APPA, ""),
    ("min_dimension", "*", "compiler", "min", 1, "elements", "measured: ANE guide ch. 4", "no zero size"),
    # convolution
    ("conv_kernel_width", "A13", "compiler", "max", 13, "elements", _APPA, "fp16, large mode"),
    ("conv_kernel_width", "A14+", "compiler", "max", 16, "elements", _APPA, "fp16, large mode"),
    ("conv_kernel_width", "*", "e5rt", "max", 15, "elements", _AFCAP, "16 fails to compile on M5"),
    ("conv_kernel_width", "m4", "coreml", "max", 16, "elements", _M6CML, "K x K"),
    ("conv_kernel_width", "m4", "coreml", "max", 15, "elements", _M6CML, "1 x K"),
    ("conv_kernel_height", "A13", "compiler", "max", 29, "elements", _APPA, ""),
    ("conv_kernel_height", "A14+", "compiler", "max", 32, "elements", _APPA, ""),
    ("conv_kernel_height", "m4", "coreml", "max", 31, "elements", _M6CML, "K x 1"),
    ("conv_kernel_depth", "*", "compiler", "max", 16, "elements", _APPA, ""),
    ("conv_dynamic_weight_batch", "*", "e5rt", "max", 1, "batch", _AFCAP, "weights that are inputs"),
    ("conv_stride", "m4", "coreml", "max", 8, "elements", _M6CML, "2 to 8 tried"),
    ("conv_groups", "m4", "coreml", "max", 64, "groups", _M6CML, "2 to 64 tried"),
    ("group_conv_fanin", "*", "compiler", "max", 2048, "elements", _APPA, "Cin*kW*kH; above it decomposes"),
    # pooling, reduction, others
    ("pool_window", "A13", "compiler", "max", 28, "elements", _APPA, "28 to 29"),
    ("pool_window", "A13", "compiler", "max", 29, "elements", "decompiled: ANEForge op catalog", ""),
    ("pool_window", "A14+", "compiler", "max", 31, "elements", _APPA, ""),
    ("max_pool_window", "A13", "compiler", "max", 28, "elements", _APPA, ""),
    ("max_pool_window", "A14+", "compiler", "max", 31, "elements", _APPA, ""),
    ("max_pool_window", "m4", "coreml", "max", 8, "elements", _M6CML, "avg_pool of 14 is accepted"),
    ("arg_reduce_axis", "*", "compiler", "max", 2048, "elements", "measured: ANE guide ch. 17", ""),
    ("lrn_channels", "*", "netplist", "max", 15, "channels", _AFCAP, ""),
    ("operand_working_set", "*", "compiler", "max", 2 * 2**20, "bytes", _APPA, "spills"),
    ("operand_working_set", "A17", "compiler", "max", 4.72e6, "bytes", "measured: ANE guide ch. 12", "knee"),
    ("kernel_resident", "*", "compiler", "max", 64 * 2**10, "bytes", _APPA, ""),
    ("kernel_stream", "*", "compiler", "max", 16 * 2**20, "bytes", _APPA, ""),
    ("program_layers", "A16", "compiler", "max", 383, "layers", "measured: maderix (M4)", "384 fails"),
    ("program_layers", "A18", "compiler", "max", 386, "layers", "measured: M6 notes", ""),
    ("program_bytes", "*", "compiler", "max", 2**31, "bytes", "presumed: no source; a caution", ""),
    # processes and programs
    ("compiles_per_process", "*", "direct", "max", 119, "compiles", "measured: maderix, Orion", "silent"),
    ("compiles_per_process", "*", "direct", "max", 132, "compiles", "measured: issues of maderix/ANE", ""),
    ("loaded_programs", "*", "e5rt", "max", 128, "programs", _E5, "per process; the 129th load fails"),
    ("queue_depth", "*", "e5rt", "max", 127, "dispatches", _E5, ""),
    ("execute_multi_ops", "*", "e5rt", "max", 110, "operations", _E5, "110 to 120"),
    # inputs and outputs of the direct path
    ("input_width", "A15", "direct", "min", 32, "elements", "measured: field guide, Espresso (M3 Max)", ""),
    ("input_width_multiple", "A15", "direct", "multiple", 32, "elements", "measured: Espresso (M3 Max)", ""),
    ("matmul_channels_multiple", "A13", "direct", "multiple", 32, "elements", "measured: ane-train (M1)", ""),
    ("matmul_rank", "A13", "direct", "max", 3, "axes", "measured: ane-train (M1)", ""),
    ("surface_bytes", "A16", "direct", "min", 49152, "bytes", "measured: Orion (M4 Max)", "48 to 49 KB"),
    ("surface_bytes", "A13", "direct", "min", 2048, "bytes", "measured: ane-train (M1)", ""),
    ("surface_row_multiple", "A17", "direct", "multiple", 128, "bytes", "measured: maderix PR 35 (M5)", ""),
    ("input_surfaces", "m4", "direct", "max", 1, "surfaces", "measured: maderix", "others use several"),
    ("elementwise_flat", "A13", "direct", "max", 16384, "elements", "measured: ane-train", "hangs above"),
    ("state_width_multiple", "*", "coreml", "multiple", 32, "elements", "measured: coremltools #2631", ""),
)  # fmt: skip
