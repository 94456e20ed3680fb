# SPDX-License-Identifier: Apache-2.0
"""The entry point that `import torch` calls: it loads every one of the group "torch.backends".

So a process that never imports optq still uses it for GPTQ checkpoints. Outside the package, because loading an entry
point imports its package, and importing optq is what OPTQ_AUTOLOAD=0 switches off. (TORCH_DEVICE_BACKEND_AUTOLOAD=0
switches off all of torch's entry points.)
"""

import os


def autoload() -> None:
    """Import optq, which registers itself as soon as transformers loads its quantizers."""
    if os.environ.get("OPTQ_AUTOLOAD", "1") != "0":
        import optq  # noqa: F401
