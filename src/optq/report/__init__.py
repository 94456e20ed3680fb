# SPDX-License-Identifier: Apache-2.0
"""The report of finished, failed and running quantizations: a page with pictures, from the files that they left."""

from .page import Report as Report
from .page import report as report
