#!/bin/sh
# A start to copy: your checkpoint and your data, from training to a folder that is served.
# Put your names below, and then:
#
#     sh my_task.sh train     # Ctrl-C stops it; the same command goes on
#     sh my_task.sh evaluate
#     sh my_task.sh predict
#     sh my_task.sh compare   # fine-tuning, the parallel adapter and CoDA side by side
#     sh my_task.sh export    # then: python served/load.py < questions.txt
#
# Extra arguments are passed on: sh my_task.sh train --gin.BATCH_SIZE=16
# `coda COMMAND --help` lists what there is; docs/own_data.md says more.
set -eu

checkpoint=flan-t5-base      # a folder in Hugging Face layout, or a name such as google/flan-t5-base
task=tasks/jsonl.gin         # JSONL, CSV or TSV with the fields "inputs" and "targets"
train=train.jsonl
validation=validation.jsonl
questions=questions.txt      # an input a line
answers=answers.jsonl
run=my_run                   # folders that are written
compared=compared
served=served
steps=1000
method=methods/coda.gin      # for another, such as methods/lora.gin, leave reduction= empty
reduction=3                  # one token in r goes through each expensive layer

adapter="$run/export/adapter"
case ${1:-} in
  train | evaluate | predict | compare | export) ;;
  *)
    echo "usage: sh $0 train|evaluate|predict|compare|export [--gin.NAME=VALUE ...]" >&2
    exit 2 ;;
esac
command=$1
shift
set -- --gin.INITIAL_CHECKPOINT_PATH="$checkpoint" "$@"
case $command in
  train)
    exec coda train --gin_file=runs/finetune.gin --gin_file="$method" --gin_file="$task" \
      --gin.MODEL_DIR="$run" --gin.TRAIN_FILE="$train" --gin.VALIDATION_FILE="$validation" \
      --gin.TRAIN_STEPS="$steps" ${reduction:+"--gin.REDUCTION=$reduction"} "$@" ;;
  evaluate)
    exec coda evaluate --gin_file=runs/evaluate.gin --gin_file="$task" \
      --gin.INITIAL_ADAPTER_PATH="$adapter" --gin.VALIDATION_FILE="$validation" "$@" ;;
  predict)
    exec coda predict --gin_file=runs/predict.gin --gin.INITIAL_ADAPTER_PATH="$adapter" \
      --gin.INPUT="$questions" --gin.OUTPUT="$answers" "$@" ;;
  compare)
    exec coda compare --gin_file=runs/compare.gin --gin_file="$task" \
      --gin.MODEL_DIR="$compared" --gin.TRAIN_FILE="$train" \
      --gin.VALIDATION_FILE="$validation" "$@" ;;
  export)
    exec coda export --gin_file=runs/export.gin --gin.INITIAL_ADAPTER_PATH="$adapter" \
      --gin.OUTPUT="$served" "$@" ;;
esac
