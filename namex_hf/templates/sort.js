for (const table of document.querySelectorAll("table")) {
  [...table.querySelectorAll("th")].forEach((head, place) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    let rises = false;
    button.addEventListener("click", () => {
      rises = !rises;
      const of = (row) => row.cells[place].textContent;
      const order = (a, b) => (parseFloat(of(a)) - parseFloat(of(b)) || of(a).localeCompare(of(b))) * (rises ? 1 : -1);
      const rows = [...table.querySelectorAll("tr")].slice(1).sort(order);
      rows[0]?.parentNode.append(...rows);
      for (const one of table.querySelectorAll("th")) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rises ? "ascending" : "descending");
    });
  });
}
