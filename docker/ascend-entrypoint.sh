#!/usr/bin/env bash
# Makes CANN known, then runs the command. The scripts read variables that may be unset.
for cann in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
  if [ -f "$cann" ]; then
    # shellcheck disable=SC1090
    source "$cann"
    break
  fi
done
# The driver's libraries, mounted from the host.
export LD_LIBRARY_PATH="/usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64/common:/usr/local/Ascend/driver/lib64/driver:${LD_LIBRARY_PATH:-}"
exec "$@"
