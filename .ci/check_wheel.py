"""The wheel holds the four packages and what they need at run time, and nothing else."""

import sys
import zipfile

PACKAGES = {"pallas_kernels", "jax_chunkattn", "models", "experiments"}
NEEDED = {
    *(f"{package}/py.typed" for package in PACKAGES),
    "experiments/assets/system_prompt.md",
    "experiments/assets/questions.txt",
    "jax_chunkattn/server/page.html",
    "models/parity.json",
    "pallas_kernels/native/attention.h",
    "pallas_kernels/native/bindings.cc",
}

[path] = sys.argv[1:]
names = zipfile.ZipFile(path).namelist()
folders = {name.split("/")[0] for name in names if ".dist-info/" not in name}
assert folders == PACKAGES, f"{path} holds {sorted(folders)}, expected {sorted(PACKAGES)}"
assert set(names) >= NEEDED, f"{path} lacks {sorted(NEEDED - set(names))}"
print(f"{path.rsplit('/')[-1]}: {len(names)} files in {', '.join(sorted(folders))}")
