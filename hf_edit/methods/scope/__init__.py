"""Edits that act where a text mentions an entity: which fact is active after each token, and how a model is run by that.

- `tracker`: tokens in; mentions, answers and active facts out. It runs no model.
- `decider`: the gate's word on one token: which facts its prompt asks for.
- `runner`: the clean pass, the edited passes, and the cache.
- `attachment`: one edit, attached to a model.
"""
