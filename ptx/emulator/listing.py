"""The PTX text with what each line cost in the margin, as one self-contained HTML page."""

import html

COLUMNS = (
    ("warps", "warp instructions executed", lambda e: e["warps"]),
    ("lanes", "active lanes per warp instruction", lambda e: _ratio(e["threads"], e["warps"])),
    ("split", "warps that diverged at this branch", lambda e: e["divergent"]),
    ("smem x", "shared-memory passes per conflict-free pass",
     lambda e: _ratio(e["wavefronts"], e["ideal_wavefronts"])),
    ("sect x", "32-byte sectors per fewest possible",
     lambda e: _ratio(e["sectors"], e["ideal_sectors"])),
    ("bytes", "bytes moved: global, shared and bulk copies",
     lambda e: e["global_read"] + e["global_written"] + e["shared_bytes"] + e["bulk_bytes"]),
    ("MFLOP", "tensor-core operations, millions", lambda e: round(e["flops"] / 1e6, 2) or ""),
)  # fmt: skip

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem; color: #1a1a1a; background: #fff; }
table.listing { border-collapse: collapse; font: 12px/1.35 ui-monospace, monospace; }
.listing td, .listing th { padding: 0 .6em; text-align: right; white-space: pre; }
.listing td.code { text-align: left; }
.listing th { position: sticky; top: 0; background: #f2f2f2; }
.listing tr.found td { background: #ffe3e0; }
.listing tr.bad td.smem, .listing td.bad { background: #fff2c4; }
.finding { font-weight: 600; color: #a01010; }
dl { display: grid; grid-template-columns: max-content max-content; gap: .1rem 1.5rem; }
dd { margin: 0; text-align: right; font-family: ui-monospace, monospace; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #16181c; } .listing th { background: #24272d; }
  .listing tr.found td { background: #55201c; } .listing td.bad { background: #4d4214; }
}
"""


def _ratio(a, b):
    return round(a / b, 2) if b else ""


def _cell(name, value):
    shown = f"{value:,}" if isinstance(value, int) else str(value)
    bad = name in ("smem x", "sect x") and value not in ("", 0) and value > 1.01
    return f"<td{' class=bad' if bad else ''}>{shown if value else ''}</td>"


def _row(number, text, entry, findings):
    cells = "".join(_cell(name, value(entry) if entry else "") for name, _, value in COLUMNS)
    style = " class=found" if findings else ""
    code = html.escape(text)
    notes = "".join(f"\n<span class=finding>{html.escape(str(f.message))}</span>" for f in findings)
    return f"<tr{style}>{cells}<td>{number}</td><td class=code>{code}{notes}</td></tr>"


def page(module, report):
    """The annotated listing of a launch.

    Args: module: the parsed PTX; report: what `launch` returned.
    Returns: HTML text without external references.
    """
    lines, found = report.counts.by_line(), {}
    for f in report.findings:
        found.setdefault(f.line, []).append(f)
    rows = [
        _row(i, text, lines.get(i), found.get(i, ()))
        for i, text in enumerate(module.text.split("\n"), 1)
    ]
    heads = "".join(f"<th title='{html.escape(title)}'>{name}</th>" for name, title, _ in COLUMNS)
    title = html.escape(f"{module.name}: {report.kernel}")
    summary = "".join(
        f"<dt>{k.replace('_', ' ')}</dt><dd>{v:,}</dd>" for k, v in report.counts.totals().items()
    )
    classes = "".join(f"<dt>{k}</dt><dd>{v:,}</dd>" for k, v in report.counts.by_class().items())
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{len(report.findings)} finding(s)</p><h2>Totals</h2><dl>{summary}</dl>"
        f"<h2>Warp instructions by class</h2><dl>{classes}</dl><h2>Listing</h2>"
        f"<table class=listing><tr>{heads}<th>line</th><th>PTX</th></tr>{''.join(rows)}</table>\n"
    )
