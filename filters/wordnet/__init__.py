"""WordNet 3.0, as far as captions need it: its words, and whether a word's first sense is a synset of ImageNet-21k.

words.txt.xz  one line a word, `dog Nv`: n v a r are the parts of speech it has, a capital where the first sense of that
              part of speech has the offset of an ImageNet-21k id; then one line an irregular form, `> n geese goose`
build.py      makes it: python -m filters.wordnet.build DICT
words.py      reads it; finds the word of an inflected form, and whether a token names an ImageNet-21k synset
phrases.py    the same for names of several words
LICENSE       Princeton's, for words.txt.xz
"""
