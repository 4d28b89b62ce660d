#!/bin/sh
# Takes secrets from files: NAME_FILE=/run/secrets/x sets NAME to the content of that file, so that
# a secret stands in no image, no compose file and no command line. Then it becomes the command.
set -eu

for name in PGPASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_AUTH_ADMIN_PASSWORD; do
  eval "file=\${${name}_FILE:-}"
  [ -n "$file" ] || continue
  if ! secret=$(cat -- "$file") || [ -z "$secret" ]; then
    echo "kdguard: ${name}_FILE names $file, which is empty or cannot be read by user $(id -u)." >&2
    exit 2
  fi
  export "$name=$secret"
  unset "${name}_FILE"
done

exec "$@"
