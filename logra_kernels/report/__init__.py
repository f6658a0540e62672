"""The results of a query as one self-contained HTML page: no script, no request, light and dark.

What a results file holds (JSON, written by `logra query --json`):

    format, version   "logra_kernels.results", 1
    title, created    text; ISO 8601
    model             path, dtype, fingerprint
    store             path, rows, dim, bytes, dtype, modules, projection, corpus
    curvature         kind, and damping_scale, damping or damping_rule ("auto"); of several,
                      dampings: an object with a damping_scale or damping_rule for each
    notes             sentences to stand under the heading
    tables            optional: heading, text, columns, rows of as many texts
    queries           id, prompt, text, origin, expected, modes
      modes           mode, top, bottom: passages; of several dampings damping_scale or _rule
        passage       rank, id, score, text, and optionally title, prompt, tokens, query_tokens
          tokens      pairs [text, contribution]; the contributions sum to the score
          query_tokens  the same of the query's tokens
      expected        what (a page's name), ranks {mode: rank of its first passage}
"""

from logra_kernels.report.render import MODE_NAMES, render, write_report
from logra_kernels.report.results import FORMAT, VERSION, read_results, write_results

__all__ = [
    "FORMAT",
    "MODE_NAMES",
    "VERSION",
    "read_results",
    "render",
    "write_report",
    "write_results",
]
