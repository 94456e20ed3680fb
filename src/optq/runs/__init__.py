# SPDX-License-Identifier: Apache-2.0
"""One run, from its config: the plan, the checks before the work, the data, and what lets it be resumed."""
