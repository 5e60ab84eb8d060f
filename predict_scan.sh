#!/bin/sh
# Sends one radiograph to an endpoint and writes its answer as annotated_image.png.
#
#     ./predict_scan.sh http://127.0.0.1:8000 scan.dcm
#
# Prints the boxes: confidence x y width height ... in pixels of the original image. Needs curl, and
# Python or jq.
set -eu

fail() {
  printf 'predict_scan.sh: error: %s\n' "$*" >&2
  exit 1
}

[ $# -eq 2 ] || fail "give the endpoint's URL and a file, as in $0 http://127.0.0.1:8000 scan.dcm"
url=${1%/} file=$2
if ! [ -f "$file" ] || ! [ -r "$file" ]; then fail "$file is not a file that can be read"; fi
command -v curl >/dev/null || fail "curl is not installed"
python=$(command -v python3 || command -v python || true)
[ -n "$python" ] || command -v jq >/dev/null || fail "neither Python nor jq is installed"

# value KEY: the text of that key in the answer, at the top or one level below
value() {
  if [ -n "$python" ]; then
    "$python" -c 'import json, sys
answer = json.load(open(sys.argv[1], encoding="utf-8"))
for part in (answer, *answer.values()):
    if isinstance(part, dict) and sys.argv[2] in part:
        print(part[sys.argv[2]])' "$answer" "$1"
  else
    jq -r --arg key "$1" '(., .[]) | objects | select(has($key)) | .[$key]' "$answer"
  fi 2>/dev/null
}

answer=$(mktemp)
picture=annotated_image.png.part
trap 'rm -f "$answer" "$picture"' EXIT
(: >"$picture") 2>/dev/null || fail "cannot write to $PWD"
name=${file##*/}
case ${name##*.} in *[!0-9]*) stem=${name%.*} ;; *) stem=$name ;; esac  # .123 is part of a UID
id=$(printf %s "$stem" | sed 's/[\\"]/\\&/g')

# the body goes through a pipe: a command line would be too short for it
status=$({
  printf '{"pId": "%s", "dicom": "' "$id"
  base64 <"$file" | tr -d '\n'
  printf '"}'
} | curl -s -o "$answer" -w '%{http_code}' -H 'Content-Type: application/json' \
  --data-binary @- "${url%/predict}/predict") || fail "$url does not answer"
if [ "$status" != 200 ]; then
  reason=$(value detail) || true
  fail "$name ${reason:-got HTTP status $status}"
fi
value image | base64 --decode >"$picture" || fail "$url sent no picture"
[ -s "$picture" ] || fail "$url sent no picture"
mv "$picture" annotated_image.png
boxes=$(value annotations)
echo "annotated_image.png: ${boxes:-no boxes}"
