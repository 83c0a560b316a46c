"""The process boundary across a Ray cluster: workers as actors on its nodes, encoded bytes in Ray's object store.

    front end                    bridge (child process)         actor on a node              worker process
    Link    ── pipes ──────────▶ RemoteWorker ── calls ───────▶ WorkerHost ── pipes ───────▶ WorkerLink
            ◀─────────────────────────────────── generator ────           ◀────────────────
    Spool   ── segments ───────▶ Uploads ─────── objects ─────▶ NodeFiles ── files ────────▶ WorkerBlobs

Ray ends a process that has lost the head of its cluster for a minute. Therefore the front end is no Ray process: its
bridge is, and is started again. The worker process, its link and its files are those of `wire.local`: what a worker
computes does not depend on where it runs.
"""
