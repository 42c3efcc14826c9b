"""One folder per op: reference, Triton kernel, public function (none yet)."""
