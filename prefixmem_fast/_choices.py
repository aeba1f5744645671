"""The words that options take. They stand here because the command line lists them before it imports torch."""

MODES = ("prefix", "suffix", "full")
ADDRESSING = ("auto", "hash")
MOST_HISTORY = 16  # items back
BACKENDS = ("auto", "triton", "native", "cpu", "reference")
GRADS = ("dense", "sparse", "fused")
TABLES = ("device", "host", "mapped")
PARTS = ("validation", "test")
SEARCHES = ("constrained", "unconstrained")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
QUANTIZATIONS = ("int8", "fp8")
DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZED_DTYPES = ("int8", "float8_e4m3fn")  # of QUANTIZATIONS, as torch names them
SHAPES = ("paper", "float32", "suffix", "full", "wide", "odd", "cross-item", "float64")
COLLISIONS = ("keep", "last-level", "extra-level")
LAYOUTS = ("items-first", "levels-first")
ROW_OPTIMIZERS = ("sgd", "row-adagrad", "row-adam", "lazy-adam")  # rules of operation/rules.py, as options name them
SENT_DTYPES = ("bfloat16", "float32")  # of tables on several GPUs, and of numbers between them
ENGINES = ("auto", "transformers", "vllm")
