import os, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")          # tiny models: more threads only wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")      # a GPU is for test_cuda.py: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py
os.environ.setdefault("SLM_TEST_DTYPE", "float32")     # --dtype auto would time steps, and may choose bfloat16
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
