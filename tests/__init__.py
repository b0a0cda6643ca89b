import os

# Triton looks at it when it is imported, which torch does too: kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
