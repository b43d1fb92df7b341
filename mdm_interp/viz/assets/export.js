// Saving what a plot shows: as a picture, or as a table.

// Buttons for a plot's bar; `linesOf` gives the lines of its table, the header first.
function saveButtons(filename, linesOf) {
  const save = (format, title, icon, click) => ({ name: format, title, icon: Plotly.Icons[icon], click });
  return [
    save("png", "Save as PNG", "camera", (graph) => Plotly.downloadImage(graph, { format: "png", scale: 2, filename })),
    save("svg", "Save as SVG", "pencil", (graph) => Plotly.downloadImage(graph, { format: "svg", filename })),
    save("csv", "Save as CSV", "disk", (graph) => download(`${filename}.csv`, csvOf(linesOf(graph)))),
  ];
}

function csvOf(lines) {
  const quoted = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
  return lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
}

function download(filename, text) {
  const link = Object.assign(document.createElement("a"), { download: filename, href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
