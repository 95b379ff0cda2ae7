"""Speed: one harness (`harness`), the shapes of each op, the peers, and the results measured.

One file per op stem holds shapes and the arithmetic of their FLOPs and bytes; all timing is in
`harness`; `rows` turns a case into rows, `worker` runs many of them, `run_file` keeps the JSON.
"""
