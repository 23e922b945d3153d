"use strict";
(() => {
  // Times in the reader's own zone and words; the ISO text stays in the hover.
  const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const brief = new Intl.DateTimeFormat(undefined, {
    month: "short", day: "numeric", hour: "numeric", minute: "2-digit",
  });
  const ago = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
  const units = [["year", 31557600], ["month", 2629800], ["week", 604800], ["day", 86400],
                 ["hour", 3600], ["minute", 60]];
  for (const node of document.querySelectorAll("time[datetime]")) {
    const when = new Date(node.dateTime);
    const seconds = (when - Date.now()) / 1000;
    const [unit, length] = units.find(([, l]) => Math.abs(seconds) >= l) ?? ["minute", 60];
    const words = ago.format(Math.round(seconds / length), unit);
    node.textContent = node.dataset.short === undefined
      ? `${full.format(when)} (${words})` : brief.format(when);
  }

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "descending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "ascending" : "descending");
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          return x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y);
        };
        const rows = [...body.rows].sort((a, b) => (down ? order(a, b) : order(b, a)));
        body.append(...rows);
      });
    });
  }

  const links = [...document.querySelectorAll("nav a")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      for (const link of links) link.removeAttribute("aria-current");
      links.find((l) => l.hash === `#${entry.target.id}`)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -80%" });
  for (const section of document.querySelectorAll("main > section")) watcher.observe(section);

  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy).textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        button.textContent = "press Ctrl+C";
        getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      }
    });
  }
})();
