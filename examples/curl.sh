#!/bin/sh
# Every endpoint with curl alone. Usage: examples/curl.sh [URL]; EDGE_API_KEY if the server has a key.
set -eu
URL="${1:-http://127.0.0.1:8000}"
ask() { curl -sS --fail-with-body -H "Authorization: Bearer ${EDGE_API_KEY:-none}" -H "Content-Type: application/json" "$@"; echo; }

ask "$URL/health"
ask "$URL/v1/models"

# an answer
ask "$URL/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "max_tokens": 32, "temperature": 0}'

# the same as a stream
ask -N "$URL/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "Count to five."}],
  "max_tokens": 32, "stream": true, "stream_options": {"include_usage": true}}'

# JSON that obeys a schema
ask "$URL/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "Name a city and its country."}],
  "max_tokens": 200,
  "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": {
    "type": "object", "additionalProperties": false, "required": ["city", "country"],
    "properties": {"city": {"type": "string", "maxLength": 30},
                   "country": {"type": "string", "maxLength": 30}}}}}}'

# how the model reads text, and how likely it finds it
ask "$URL/tokenize" -d '{"prompt": "Hello, world"}'
ask "$URL/v1/completions" -d '{"prompt": "Hello, world", "echo": true, "logprobs": 1, "max_tokens": 0}'

ask "$URL/metrics" | grep '^edge_' | head -20
