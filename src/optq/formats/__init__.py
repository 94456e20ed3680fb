# SPDX-License-Identifier: Apache-2.0
"""Other formats, one file each: what is read, and what is written."""
