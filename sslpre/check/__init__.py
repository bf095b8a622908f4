"""Before hours are spent: the images (`files`, `copies`), the machine (`machine`, `pair`), what a run would choose and
how long it would take (`choice`), what to think of it (`findings`, `remarks`), and all of it in one `report`."""
