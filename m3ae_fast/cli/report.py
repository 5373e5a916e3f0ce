"""m3ae-fast report RUN ...: print the status of a run, and write a self-contained page about it, report.html, which can
be read without a server.

The first line of the output begins with Finished, Stopped, Running or Failed or, if status.json is missing, with Step.
The page begins with a summary of the results and diagnostics. It also contains the results of evaluations (every
result.json below the run folder and below `--results`), curves, figures, the config and versions. Further runs are
added to the tables and curves.
"""

from __future__ import annotations

import sys
from pathlib import Path

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.cli.command_line import program
from m3ae_fast.config.arguments import output


def main(argv: list[str] | None = None) -> int:
    parser = program("report", __doc__)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="a run folder; any further runs are added to the tables and curves of its report",
    )
    parser.add_argument("--out", type=output(".html"), help="output file (default: RUN/report.html)")
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders outside RUN whose results (every result.json below them) are included",
    )
    args = parser.parse_args(argv)
    from m3ae_fast.base.metrics_file import read_metrics
    from m3ae_fast.evaluation.run_report import REPORT_FILE, summary, write_report

    run, *others = args.runs
    print(summary(run, read_metrics(run))[0], flush=True)
    out = args.out or run / REPORT_FILE
    write_report(run, out, args.results, others)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
