"""fastText's language identification, a batch of captions at a time.

model.py  a model file as arrays          words.py  captions -> hidden vectors
tree.py   hidden vectors -> labels        guess.py  both, and which captions only fastText itself can tell
"""
