"""The deliveries' fault run: `python -m tests.delivery_faults`, or `make delivery-faults`.

Writers change users while two replicas of the notification service send mail and call webhooks at servers that
misbehave; the run kills and stops the replicas, and Postgres, and replays and discards what was parked. At the end the
servers behave, and `promises` judges what the servers got against what the databases say. `docs/proof.md` explains what
is proved.
"""
