"""Data: from files and seqio tasks to the batches that models take.

Without seqio and TensorFlow:

- `batches`: examples to batches, padded or packed, as long as they are; epochs of examples.
- `text_batches`: a batch of texts, for those who call a model in Python.
- `examples`: what examples a model can take; what is found in all of a file.
- `cache`: the file that holds a task's tokenised examples.
- `vocabularies`: a folder's vocabulary, whatever its kind; bytes; whether it is a model's.
- `sentencepiece_vocabulary`, `tokenizers_vocabulary`: spiece.model; tokenizer.json and others.
- `sentencepiece_file`: what is refused in a spiece.model before it is loaded.
- `vocabulary_files`: names of the files, and which tokens are special.
- `vocabulary_agreement`: whether two kinds in one folder are the same vocabulary.
- `stop_texts`: the table by which a compiled program finds the texts that end an output.
- `rows`: files of JSONL, CSV and TSV: their rows, and what is taken of them.
- `jsonl`: tasks over such files whose rows have two texts.
- `labels`: tasks over those with a text and a class or a number.
- `scores`, `classes`: how texts, and how classes, are compared.
- `source`: `Data`, which finds the examples of a task's name or of a cache file.
- `epoch_steps`: how many steps are so many epochs.
- `reports`: what is said of them.

With them:

- `seqio_tasks`, `seqio_vocabularies`, `seqio_converters`: what is built on seqio; they import it at
  the top.
- `seqio_agreement`: whether seqio's vocabularies are those of a model.
- `images`: image files to patches. TensorFlow is imported when patches are made.
- `image_files`, `headers`: image files as they are to be seen; questions above them.
- `audio`: recordings to frames. TensorFlow is imported when frames are made.
- `audio_containers`: whether a recording is whole.
"""
