# SPDX-License-Identifier: Apache-2.0
"""Folders of models: how they are found, read and written."""
