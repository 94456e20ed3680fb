# SPDX-License-Identifier: Apache-2.0
"""The public verbs, one file each."""
