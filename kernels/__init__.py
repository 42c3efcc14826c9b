"""One folder per op: reference, Triton kernel, CPU routes, one public function."""
