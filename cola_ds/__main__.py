"""`python -m cola_ds` is the command `cola-ds`."""

from cola_ds.cli import main

raise SystemExit(main())
