# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls when it starts: `register` makes it read every GPTQ checkpoint, those that it refuses by itself too.

vLLM loads the entry point `vllm.general_plugins`; nothing else imports what is in here, and `import vllm` stands in
`config`, `linear` and `experts` only.
"""

import logging
import os

logger = logging.getLogger(__name__)

SWITCH = "OPTQ_VLLM"
"""Environment variable: 0 leaves vLLM as it is. So does VLLM_PLUGINS, vLLM's own, if it does not name optq."""


def register() -> None:
    """Tell vLLM of the quantization method "optq". What it cannot use is said, and vLLM starts without it."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "false", "no", "off"):
        return
    try:
        from . import config
    except (ImportError, AttributeError) as error:
        from importlib.metadata import packages_distributions, version

        found = {name: version(name) for name in packages_distributions().get("vllm", ())}
        logger.error(
            "optq cannot add to %s, which has another interface than optq knows: %s. vLLM goes on without it, and "
            "reads what it reads by itself. See docs/serving.md for the versions that are known.",
            found or "vLLM",
            error,
        )
        return
    config.register()
