"""The fault run: `python -m tests.faults`, or `make faults`.

Writers and readers, each a process of their own, work against several replicas of the user service while the run kills,
pauses, cuts and restarts what they depend on. Both write down what they asked for, were answered and received, outside
of the system and fsynced; `tests.proof` judges it promise by promise. `docs/proof.md` explains what is proved.
"""
