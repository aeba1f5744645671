"""Tables on several GPUs, and what each way of placing them costs."""
